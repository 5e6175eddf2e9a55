"""Tests of served applications whose replica is suspended, and whose `mhmoe serve deploy` is killed or runs twice."""

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.serve_client import serve_details
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.config import DEPLOYMENT
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import command, mhmoe
from tests.faults import harness
from tests.support.watch import events_of_kind, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

BODY = {"prompt": "the quick", "max_tokens": 8, "temperature": 0}
REQUEST_SECONDS = 200
"""Timeout in seconds of a request: long, since it only ends tests that hang."""


@pytest.fixture
def run(tmp_path, local_cluster) -> RunDir:
    return make_run(tmp_path, MIXTRAL)


def start_deploy(run: RunDir, name: str, port: int) -> subprocess.Popen[str]:
    """Start the command that deploys a run under a name, without waiting for its end."""
    words = command("serve", "deploy", str(run.path), "--name", name, "--set", f"serve.port={port}")
    return subprocess.Popen(words, cwd=run.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def removed_at_end(folder: Path, name: str, *processes: subprocess.Popen[str]) -> Iterator[None]:
    """Kill the processes and remove the application at the end of the block."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        assert mhmoe(folder, "serve", "down", name).code == 0


def status_of(folder: Path, name: str) -> str:
    """Return the status of the only application, as `mhmoe serve status` reports it."""
    [application] = mhmoe(folder, "serve", "status", "--json").json()
    assert application["name"] == name
    return application["status"]


def running_pids(name: str) -> list[int]:
    """Return the process ids of an application's running replicas."""
    replicas = serve_details(connect())["applications"][name]["deployments"][DEPLOYMENT]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]


def complete(name: str, port: int) -> httpx.Response:
    url = f"http://127.0.0.1:{port}/{name}/v1/completions"
    return httpx.post(url, json=BODY, timeout=REQUEST_SECONDS)


def completion_text(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_a_suspended_replica_answers_after_it_continues_and_is_replaced_if_it_does_not(tmp_path, run, unused_port):
    name = "suspended"
    deploying = start_deploy(run, name, unused_port)
    with removed_at_end(tmp_path, name, deploying), ThreadPoolExecutor(3) as pool:
        err = deploying.communicate(timeout=REQUEST_SECONDS)[1]
        assert deploying.returncode == 0, err
        expected_text = completion_text(complete(name, unused_port))
        [pid] = running_pids(name)
        harness.kill(pid, signal.SIGSTOP)
        requests = [pool.submit(complete, name, unused_port) for _ in range(3)]
        assert not any(request.done() for request in requests)
        harness.kill(pid, signal.SIGCONT)
        assert [completion_text(request.result()) for request in requests] == [expected_text] * 3
        harness.kill(pid, signal.SIGSTOP)
        requests = [pool.submit(complete, name, unused_port) for _ in range(3)]
        [new_pid] = wait_until(lambda: [p for p in running_pids(name) if p != pid], "a replica in place of this one")
        for request in requests:
            response = request.result()
            if response.status_code != 200:
                assert (response.status_code, response.json()["error"]["code"]) == (503, "lost")
                assert "\n" not in response.json()["error"]["message"]
        wait_until(lambda: status_of(tmp_path, name) == "RUNNING", "the application's recovery")
        assert completion_text(complete(name, unused_port)) == expected_text
        assert new_pid != pid


def test_a_killed_deploy_leaves_an_application_that_status_knows(tmp_path, run, unused_port):
    name = "orphan"
    deploying = start_deploy(run, name, unused_port)
    with removed_at_end(tmp_path, name, deploying):
        assert any(line.startswith("deploying ") for line in deploying.stderr)
        deploying.kill()
        deploying.communicate()
        assert status_of(tmp_path, name) in ("DEPLOYING", "RUNNING")
        wait_until(lambda: status_of(tmp_path, name) == "RUNNING", "the application")
        [event] = events_of_kind(run, "served")
        assert event["application"] == name
        expected_text = completion_text(complete(name, unused_port))
        # A second command of the same words finds the application, and changes no answer.
        result = mhmoe(tmp_path, "serve", "deploy", str(run.path), "--name", name, "--set", f"serve.port={unused_port}")
        assert result.code == 0, result.err
        assert completion_text(complete(name, unused_port)) == expected_text


def test_two_deploys_of_one_name_leave_one_application_that_answers(tmp_path, run, unused_port):
    name = "twins"
    twins = [start_deploy(run, name, unused_port) for _ in range(2)]
    with removed_at_end(tmp_path, name, *twins):
        for deploying in twins:
            out, err = deploying.communicate(timeout=REQUEST_SECONDS)
            assert "Traceback" not in out + err
            assert deploying.returncode == 0 or err.splitlines()[-1].startswith("error: "), err
        assert any(deploying.returncode == 0 for deploying in twins)
        wait_until(lambda: status_of(tmp_path, name) == "RUNNING", "the application")
        completion_text(complete(name, unused_port))
        assert len(running_pids(name)) == 1
