"""Tests of remote jobs: requests are sent to a cluster, and their progress and results come back."""

import dataclasses
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest

from mhmoe_ray.cluster import jobs, remote
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.cluster.nodes import head_python
from mhmoe_ray.cluster.runs import start_attempt
from mhmoe_ray.errors import DataError, JobError, RunError
from mhmoe_ray.remote import JOB_CONFIG
from mhmoe_ray.runs.directory import RunDir, create_run, last_attempt, read_attempts
from mhmoe_ray.train.job import TrainRequest
from tests.cluster.toy_job import SumRequest
from tests.support.specs import tiny_spec


class LostRequest(SumRequest):
    """Request whose module does not exist."""

    module: ClassVar[str] = "no_such_module"


RUNTIME_ENV = {"env_vars": {"PYTHONPATH": str(Path.cwd())}}


@pytest.mark.ray
def test_job_returns_its_progress_lines_and_its_result(local_cluster):
    lists = {
        f"é{i}": [i, *range(2_000)] for i in range(100)
    }  # the result is longer than the pieces in which Ray sends a log
    job = remote.submit(connect(local_cluster.address), RUNTIME_ENV, SumRequest(numbers=lists))
    assert list(job.progress()) == ["sum: of 100 lists"]
    assert job.result("the sums") == {name: sum(numbers) for name, numbers in lists.items()}


@pytest.mark.ray
@pytest.mark.slow  # tests/cli/test_errors.py tests the errors of preparations
def test_error_of_a_job_is_raised_by_result(local_cluster):
    connection = connect(local_cluster.address)
    job = remote.submit(connection, RUNTIME_ENV, SumRequest(numbers={}))
    assert list(job.progress()) == []
    with pytest.raises(DataError, match="there are no numbers"):
        job.result("the sums")
    submitted_job = remote.submit(connection, {}, LostRequest(numbers={}))
    list(submitted_job.lines())
    with pytest.raises(JobError, match="the sums"):
        submitted_job.result("the sums")


@pytest.mark.ray
def test_job_on_another_cluster_runs_in_the_python_of_ray(local_cluster):
    remote_connection = dataclasses.replace(connect(local_cluster.address), local=False)
    python = head_python(remote_connection, {})
    assert Path(python).parent == Path(sys.executable).parent
    # A runtime environment with pip has its own interpreter, which Ray puts first on the PATH of the job.
    assert head_python(remote_connection, {"pip": ["x"]}) == "python"
    runtime_env = {"env_vars": {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path.cwd())}}
    job = remote.submit(remote_connection, runtime_env, SumRequest(numbers={"a": [1, 2]}))
    list(job.lines())
    assert job.result("the sums") == {"a": 3}


def test_attempt_of_a_renamed_run_has_the_name_of_its_job(tmp_path, monkeypatch):
    submitted = []
    monkeypatch.setattr(jobs, "submit", lambda connection, submission: submitted.append(submission["submission_id"]))
    spec = tiny_spec(tmp_path)
    run = RunDir(create_run(spec).path.rename(tmp_path / "runs/my_best run.2"))
    job = start_attempt(run, spec, Connection("http://127.0.0.1:1", True, True, None))
    assert [job] == submitted == ["my-best-run-2-1"]
    assert last_attempt(run).job == job


def test_attempts_that_start_at_the_same_time_have_different_numbers(tmp_path, monkeypatch):
    submitted = []
    monkeypatch.setattr(jobs, "submit", lambda connection, submission: submitted.append(submission["submission_id"]))
    spec = tiny_spec(tmp_path)
    run = create_run(spec)
    connection = Connection("http://127.0.0.1:1", True, True, None)
    start_attempt(run, spec, connection)

    def resume(_: int) -> str | None:
        with suppress(RunError):
            return start_attempt(run, spec, connection)

    with ThreadPoolExecutor(4) as pool:
        jobs_of_threads = sorted(job for job in pool.map(resume, range(4)) if job)
    assert jobs_of_threads == [f"{run.id}-{number}" for number in range(2, len(submitted) + 1)]
    assert sorted(submitted) == [a.job for a in read_attempts(run)] == [f"{run.id}-1", *jobs_of_threads]


def test_request_is_sent_in_the_environment_and_named_in_the_entrypoint(tmp_path, monkeypatch):
    request = TrainRequest(path=str(tmp_path / "tiny-3f2a1c"), attempt=2)
    submission = remote.job_request(request, True, {"env_vars": {"A": "b"}})
    assert submission["submission_id"] == "tiny-3f2a1c-2"
    assert submission["entrypoint"].endswith(" -m mhmoe_ray.train.job tiny-3f2a1c-2")
    assert submission["metadata"] == {"mhmoe_run": "tiny-3f2a1c", "mhmoe_path": str(tmp_path / "tiny-3f2a1c")}
    variables = submission["runtime_env"]["env_vars"]
    assert variables.pop("A") == "b"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": submission["runtime_env"]}))
    assert TrainRequest.received() == request
    # Workers inherit the rest of the environment without the request.
    assert json.loads(os.environ[JOB_CONFIG])["runtime_env"]["env_vars"] == {}
