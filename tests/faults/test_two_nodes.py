"""Test of a cluster of two nodes without a common file system, whose data and runs are on an S3 server."""

import json
import re
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path

import httpx
import pytest

from mhmoe_ray.runs.directory import list_runs
from mhmoe_ray.storage import location
from tests.cli.run import mhmoe
from tests.faults import harness, two_nodes
from tests.faults.conftest import undisturbed_run
from tests.support.s3 import CREDENTIALS
from tests.support.watch import run_has_ended, wait_for_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.system, pytest.mark.timeout(900)]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it asks for the token
    except OSError:
        return False


def test_nodes_without_a_common_folder_train_resume_and_serve_after_a_power_failure(project, tmp_path):
    """Two nodes prepare data and train, both lose power, and one node with more CPUs finishes the run.

    The last node then serves the run and answers a file of prompts on the S3 server, with equal texts.
    """
    token_file = tmp_path / "token"
    token_file.write_text("a-token-of-the-test-cluster")
    token_file.chmod(0o600)
    client = {"RAY_AUTH_TOKEN_PATH": str(token_file), "MHMOE_HOME": str(tmp_path / "home"), **CREDENTIALS}
    # Paths of sockets must be short.
    private_folder = Path(tempfile.mkdtemp(prefix="two-", dir="/tmp"))

    def call(*words: str):
        return mhmoe(tmp_path, *words, **client)

    with two_nodes.network(), two_nodes.s3_server(tmp_path) as system:
        for path in (project / "raw").rglob("*.jsonl"):
            with system.open_output_stream(f"bucket/raw/{path.relative_to(project / 'raw')}") as out:
                out.write(path.read_bytes())
        uri = "s3://bucket/{}?" + two_nodes.S3_QUERY
        harness.write_random_spec(
            tmp_path,
            train={"steps": 120},
            data={"sources": {"web": {"path": uri.format("raw")}}, "prepared": uri.format("data")},
            cluster={"cpus_per_worker": 2, "shard_cache": {"path": str(private_folder / "cache")}},
        )
        storage = uri.format("runs")
        nodes = [two_nodes.RayNode(name, private_folder, token_file, 3) for name in ("mhmoe-a", "mhmoe-b")]
        try:
            wait_until(lambda: answers(two_nodes.DASHBOARD), "the dashboard")
            time.sleep(10)  # the second node joins
            options = ["--address", two_nodes.DASHBOARD, "--set", f"storage={storage}", "--detach"]
            submitted = call("submit", "spec.yaml", *options)
            assert submitted.code == 0, submitted.err
            [run] = list_runs(storage)
            workers = harness.workers_of_start(run, 1)
            assert len({worker["node"] for worker in workers}) == 2
            wait_until(lambda: harness.step_of(run) >= 20, "some steps")
            assert not run_has_ended(run)
        finally:
            for node in nodes:
                node.kill()
        node = two_nodes.RayNode("mhmoe-a", private_folder, token_file, 5)
        try:
            wait_until(lambda: answers(two_nodes.DASHBOARD), "the dashboard")
            resumed = call(
                "resume", run.id, "--address", two_nodes.DASHBOARD, "--force", "--storage", storage, "--detach"
            )
            assert resumed.code == 0, resumed.err
            wait_for_end(run)
            options = [run.id, "--address", two_nodes.DASHBOARD, "--storage", storage]
            deployed = call("serve", "deploy", *options, "--set", f"serve.host={two_nodes.HEAD}")
            assert deployed.code == 0, deployed.err
            url = re.search(r" at (http://\S+/v1/completions);", deployed.out)[1]
            request = {"prompt": "the quick", "max_tokens": 8, "temperature": 0}
            [choice] = httpx.post(url, json=request, timeout=60).json()["choices"]
            prompts, output = uri.format("prompts.jsonl"), uri.format("answers")
            location(prompts).write_bytes(json.dumps({"prompt": request["prompt"]}).encode() + b"\n")
            sampling = ["--max-tokens", "8", "--temperature", "0"]
            generated = call("generate", *options, "--input", prompts, "--output", output, *sampling)
            assert generated.code == 0, generated.err
            [answer_file] = location(output).glob("chunk-*")
            assert json.loads(answer_file.read_text())["text"] == choice["text"] != ""
        finally:
            node.kill()
        # The number of threads may change bits.
        harness.assert_equals_undisturbed_run(run, undisturbed_run(project, cpus_per_worker=2))
        report = call("report", run.id, "--storage", storage)
        assert report.code == 0, report.err
    # Of this folder, this machine sees only what this test wrote when it compared samples.
    assert [path.name for path in private_folder.iterdir()] == ["cache"]
    shutil.rmtree(private_folder)
