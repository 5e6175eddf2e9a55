"""Which failures of workers are tried again.

This reaches into Ray 2.60; tests/train/test_ray_trainer.py fails when what it holds on to moves.
"""

import time
from typing import Any

from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from mhmoe_ray.errors import CheckpointError, MhmoeError, StorageError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train.waiting import record_waiting

STORAGE_SECONDS, LOOK_SECONDS = 600.0, 5.0


class MistakesAreFinal(DefaultFailurePolicy):
    """Workers that raise an error of ours say what a new start would only meet again, such as a gradient that is not
    finite. All else is tried again: workers that were killed, and storage, which may come back."""

    def __init__(self, failure_config: FailureConfig, run: RunDir) -> None:
        super().__init__(failure_config)
        self._run = run

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if isinstance(getattr(training_failed_error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            record_waiting(self._run)
        mistake = error_of_ours(training_failed_error)
        if mistake and not isinstance(mistake, CheckpointError | StorageError):
            return FailureDecision.RAISE
        _wait_for_storage(self._run)
        return super().make_decision(training_failed_error)


def _wait_for_storage(run: RunDir) -> None:
    """Until the run directory can be read, but not for ever: each new start reads it at once, and would fail."""
    deadline = time.monotonic() + STORAGE_SECONDS
    while time.monotonic() < deadline:
        try:
            run.spec_file.read_bytes()
            return
        except FileNotFoundError:  # somebody removed the run, as the new start will say
            return
        except OSError as e:
            print(f"warning: the workers start again when the run directory can be read: {e}")
            time.sleep(LOOK_SECONDS)


def error_of_ours(error: Exception) -> MhmoeError | None:
    """That of any rank inside an error of Ray Train's; when one rank fails, others fail in their exchanges with it."""
    causes = getattr(error, "worker_failures", {}).values()
    return next((cause for cause in causes if isinstance(cause, MhmoeError)), None)
