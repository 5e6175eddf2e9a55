"""Tests of the root cause of failed workers, and of its message."""

import os
import subprocess
import sys

import pytest
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from mhmoe_ray.errors import CheckpointError, JobError, RunError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, AttemptId, RunDir, add_attempt, create_run
from mhmoe_ray.train import worker_failures
from mhmoe_ray.train.driver import _training_error
from mhmoe_ray.train.job import TrainRequest, _record_end
from mhmoe_ray.train.worker_failures import (
    WorkerFailureCallback,
    _recorded_worker,
    failure_reason,
    root_cause,
)
from tests.support.events import record
from tests.support.specs import tiny_spec

RAY_MESSAGE = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tpid: 11953
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed."""
DEAD_PROCESS_ERROR = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError(RAY_MESSAGE))
COLLECTIVE_ERROR = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1"
)


def test_root_cause_is_not_a_collective_error():
    own_error, other_error = JobError("training", "the gradient is not finite", "lower train.lr"), ValueError("shape")
    assert root_cause({0: COLLECTIVE_ERROR, 1: DEAD_PROCESS_ERROR, 2: COLLECTIVE_ERROR}) == (1, DEAD_PROCESS_ERROR)
    assert root_cause({0: COLLECTIVE_ERROR, 3: other_error}) == (3, other_error)
    assert root_cause({0: DEAD_PROCESS_ERROR, 1: own_error}) == (1, own_error)
    assert root_cause({4: COLLECTIVE_ERROR, 2: COLLECTIVE_ERROR}) == (2, COLLECTIVE_ERROR)


def test_failure_reason_is_one_line():
    assert failure_reason(DEAD_PROCESS_ERROR) == (
        "its process is gone: SYSTEM_ERROR, Worker unexpectedly exits with a connection error code 2. End of file."
    )
    assert failure_reason(ValueError("first\n  second\n")) == "ValueError: second"
    assert failure_reason(JobError("training", "why", "fix")) == "training: why; fix"
    assert len(failure_reason(ValueError("x" * 10_000))) == 500


NOT_FINITE = JobError("training", "the gradient is not finite", "lower train.lr")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            WorkerGroupError("", {0: COLLECTIVE_ERROR, 1: ValueError("shape")}),
            "worker 1: ValueError: shape; see its log",
        ),
        (
            WorkerGroupError("", {0: COLLECTIVE_ERROR, 1: DEAD_PROCESS_ERROR}),
            f"worker 1: {failure_reason(DEAD_PROCESS_ERROR)}; see its log",
        ),
        (WorkerGroupError("", {0: COLLECTIVE_ERROR, 1: NOT_FINITE}), str(NOT_FINITE)),
        (ControllerError(ValueError("first\nsecond")), "run tiny-1: ValueError: second; see its log"),
    ],
)
def test_run_fails_with_the_root_cause(tmp_path, error, message):
    assert str(_training_error(RunDir(tmp_path / "tiny-1"), error)) == message


def test_error_of_a_remote_task_is_unwrapped():
    """Ray raises an error that is an instance of our class too, but has a traceback as its text.

    This happens for example if the checkpoint at which the stream begins is damaged.
    """
    checkpoint_error = CheckpointError("checkpoint c", "it is damaged", "use another")
    ray_error = RayTaskError("configure", "\x1b[36mray::\x1b[39m Traceback", checkpoint_error).as_instanceof_cause()
    assert isinstance(ray_error, CheckpointError)
    assert root_cause({0: ray_error, 1: COLLECTIVE_ERROR}) == (0, checkpoint_error)
    assert str(_training_error(RunDir("tiny-1"), WorkerGroupError("", {0: ray_error}))) == str(checkpoint_error)


def test_rank_that_failed_before_start_has_no_recorded_worker(tmp_path):
    run = RunDir(tmp_path)
    assert _recorded_worker(run, 0) == {}
    worker = {"rank": 0, "host": "a", "pid": 1, "node": "n"}
    record(run, "started", workers=[worker])
    assert _recorded_worker(run, 0) == worker
    assert _recorded_worker(run, 1) == {}
    # If a worker group grows, "restoring" comes without "lost".
    for kind in ("lost", "restoring"):
        record(run, kind)
        assert _recorded_worker(run, 0) == {}
        record(run, "started", workers=[worker])


def test_repeated_reports_of_a_failure_are_recorded_once(tmp_path, monkeypatch):
    """Ray Train reports the same failure at every poll while nodes are preempted."""
    run, clock = RunDir(tmp_path), iter([100.0, 102.0, 104.0, 105.0, 200.0])
    monkeypatch.setattr(worker_failures.time, "monotonic", lambda: next(clock))
    callback = WorkerFailureCallback(run, AttemptId(1))
    for failures in (
        {1: NOT_FINITE},
        {1: NOT_FINITE},
        {1: NOT_FINITE},
        {0: NOT_FINITE, 1: NOT_FINITE},
        {1: NOT_FINITE},
    ):
        callback.after_exception(None, failures)
    assert [(event["rank"], event["ranks"]) for event in events.read(run)] == [(1, 1), (0, 2), (1, 1)]


@pytest.mark.parametrize("kind", ["restoring", "started"])
def test_equal_failure_of_a_new_worker_group_is_recorded(tmp_path, kind):
    """A single worker always has rank 0, and it may fail at once when it is restarted."""
    run = RunDir(tmp_path)
    callback = WorkerFailureCallback(run, AttemptId(1))
    for step in (1, 2):
        callback.after_exception(None, {0: JobError("training", f"it failed at step {step}", "lower train.lr")})
        callback.after_exception(None, {0: NOT_FINITE})
        record(run, kind)
    reasons = [event["reason"] for event in events.read(run) if event["event"] == "lost"]
    assert reasons == [f"training: it failed at step {step}; lower train.lr" for step in (1, 2)]


def test_storage_failure_does_not_prevent_a_restart(tmp_path, capsys):
    run = RunDir(tmp_path)
    run.events_file.mkdir()  # a folder cannot be read as a file
    WorkerFailureCallback(run, AttemptId(1)).after_exception(None, {0: ValueError("shape")})
    message = f"rank 0 failed (ValueError: shape), but the event cannot be recorded: file {run.events_file}: it is no"
    assert message in capsys.readouterr().out


def test_secrets_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "token-of-the-hub")
    monkeypatch.setattr(worker_failures, "_last_lines", lambda worker: ["401 for token-of-the-hub", "ok"])
    run = RunDir(tmp_path)
    WorkerFailureCallback(run, AttemptId(1)).after_exception(
        None, {0: ValueError("s3://me:password@bucket is refused")}
    )
    [event] = events.read(run)
    assert (event["reason"], event["lines"]) == ("ValueError: s3://***@bucket is refused", ["401 for ***", "ok"])
    add_attempt(run, Attempt("job-1", "http://127.0.0.1:1", local=True))
    _record_end(run, AttemptId(1), "failed", "it needs token-of-the-hub")
    assert events.read(run)[-1]["reason"] == "it needs ***"


def test_job_of_an_older_attempt_writes_nothing(tmp_path):
    run = create_run(tiny_spec(tmp_path))
    for job in ("a", "b"):
        add_attempt(run, Attempt(job, "http://x", local=True))
    files = sorted(run.path.rglob("*"))
    request = TrainRequest(path=str(run.path), attempt=1)
    command = [sys.executable, "-m", request.module]
    process = subprocess.run(command, env={**os.environ, **request.environment}, capture_output=True, text=True)
    assert process.returncode == RunError.exit_code
    assert process.stdout == f"error 7: run {run.id}: it was resumed elsewhere; leave it to the newer job\n"
    assert sorted(run.path.rglob("*")) == files
    _record_end(run, AttemptId(1), "failed", "it was killed")
    WorkerFailureCallback(run, AttemptId(1)).after_exception(None, {0: ValueError("shape")})
    assert events.read(run) == []
