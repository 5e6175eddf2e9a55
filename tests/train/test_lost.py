"""Which of the workers that failed is the cause, and how that is said."""

from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from mhmoe_ray.errors import JobError
from mhmoe_ray.train.lost import first_cause, reason

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
