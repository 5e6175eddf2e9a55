"""The choice of the failed worker that is the cause, and the message about it."""

import pytest
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from mhmoe_ray.errors import CheckpointError, JobError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train import worker_failures
from mhmoe_ray.train.driver import _explain
from mhmoe_ray.train.worker_failures import RecordLost, _place, causes, first_cause, reason

RAYS = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tpid: 11953
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed."""
GONE = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError(RAYS))
EXCHANGE = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1")


def test_the_cause_is_not_who_failed_in_an_exchange_with_it():
    assert first_cause({0: EXCHANGE, 1: GONE, 2: EXCHANGE}) == 1
    assert first_cause({0: EXCHANGE, 3: ValueError("shape")}) == 3
    assert first_cause({0: GONE, 1: JobError("training", "the gradient is not finite", "lower train.lr")}) == 1
    assert first_cause({4: EXCHANGE, 2: EXCHANGE}) == 2


def test_reasons_are_one_line_without_guesses():
    assert reason(GONE) == (
        "its process is gone: SYSTEM_ERROR, Worker unexpectedly exits with a connection error code 2. End of file."
    )
    assert reason(ValueError("first\n  second\n")) == "ValueError: second"
    assert reason(JobError("training", "why", "fix")) == "training: why; fix"
    assert len(reason(ValueError("x" * 10_000))) == 500


NOT_FINITE = JobError("training", "the gradient is not finite", "lower train.lr")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (WorkerGroupError("", {0: EXCHANGE, 1: ValueError("shape")}), "worker 1: ValueError: shape; see its log"),
        (WorkerGroupError("", {0: EXCHANGE, 1: GONE}), f"worker 1: {reason(GONE)}; see its log"),
        (WorkerGroupError("", {0: EXCHANGE, 1: NOT_FINITE}), str(NOT_FINITE)),
        (ControllerError(ValueError("first\nsecond")), "run tiny-1: ValueError: second; see its log"),
    ],
)
def test_the_run_fails_for_the_cause_that_is_recorded(tmp_path, error, told):
    assert str(_explain(RunDir(tmp_path / "tiny-1"), error)) == told


def test_an_error_in_a_process_that_a_rank_called_is_that_error():
    """One case is a damaged checkpoint at which the stream is to begin.

    Ray's error is then one of our classes too, and its text is a traceback.
    """
    damaged = CheckpointError("checkpoint c", "it is damaged", "use another")
    rays = RayTaskError("configure", "\x1b[36mray::\x1b[39m Traceback", damaged).as_instanceof_cause()
    assert isinstance(rays, CheckpointError)
    assert causes({0: rays, 1: EXCHANGE}) == {0: damaged, 1: EXCHANGE}
    assert str(_explain(RunDir("tiny-1"), WorkerGroupError("", {0: rays}))) == str(damaged)


def test_a_rank_that_failed_before_it_had_started_has_no_process_of_an_earlier_group(tmp_path):
    run = RunDir(tmp_path)
    assert _place(run, 0) == {}
    here = {"rank": 0, "host": "a", "pid": 1, "node": "n"}
    events.record(run, "started", workers=[here])
    assert _place(run, 0) == here
    assert _place(run, 1) == {}
    for kind in ("lost", "restoring"):  # the second also without the first, where a group grows
        events.record(run, kind)
        assert _place(run, 0) == {}
        events.record(run, "started", workers=[here])


def test_who_is_told_of_at_every_poll_is_recorded_once_and_again_when_it_fails_again(tmp_path, monkeypatch):
    """Ray Train polls on while nodes are taken away, and hears of the same failure each time."""
    run, clock = RunDir(tmp_path), iter([100.0, 102.0, 104.0, 105.0, 200.0])
    monkeypatch.setattr(worker_failures.time, "monotonic", lambda: next(clock))
    record = RecordLost(run)
    for failed in ({1: NOT_FINITE}, {1: NOT_FINITE}, {1: NOT_FINITE}, {0: NOT_FINITE, 1: NOT_FINITE}, {1: NOT_FINITE}):
        record.after_exception(None, failed)
    assert [(event["rank"], event["ranks"]) for event in events.events(run)] == [(1, 1), (0, 2), (1, 1)]


def test_a_storage_that_fails_does_not_keep_workers_from_starting_again(tmp_path, capsys):
    run = RunDir(tmp_path)
    run.events_file.mkdir()  # which nobody can read
    RecordLost(run).after_exception(None, {0: ValueError("shape")})
    assert "rank 0 failed (ValueError: shape), but [Errno 21] Is a directory" in capsys.readouterr().out
