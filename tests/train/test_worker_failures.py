"""Which of the workers that failed is the cause, and how that is said."""

import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from mhmoe_ray.errors import JobError
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.train.driver import _explain
from mhmoe_ray.train.worker_failures import first_cause, reason

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
