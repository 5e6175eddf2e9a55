"""What a run changes about Ray Train's trainer: how large a group of workers is, which failures are tried again, and
where the stream begins.

Two of them have no public hook. So this reaches into Ray 2.60; tests/train/test_ray_trainer.py fails when what it holds
on to moves.
"""

import os
from typing import Any

import ray.data
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.errors import CheckpointError, MhmoeError, StorageError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.files import remove_tree
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.manifest import newest_checkpoint, unfinished
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.elastic import AllowedSizes
from mhmoe_ray.train.hashing import describe_together


class RunTrainer(TorchTrainer):
    def __init__(self, run: RunDir, spec: RunSpec, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._run, self._spec = run, spec

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = MistakesAreFinal(self.run_config.failure_config)
        if self._spec.cluster.workers.elastic:
            # For a placement that was counted beforehand. One that waits counts on a node that is dead without Ray
            # knowing it, for some 20 s; for as long as Ray would wait, nobody would train.
            os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, "15")
            given["scaling_policy"] = AllowedSizes(self.scaling_config, self._run, self._spec)
        return super()._initialize_and_run_controller(**given)


class MistakesAreFinal(DefaultFailurePolicy):
    """Workers that raise an error of ours say what a new start would only meet again, such as a gradient that is not
    finite. All else is tried again: workers that were killed, and storage, which may come back."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        mistake = error_of_ours(training_failed_error)
        if mistake and not isinstance(mistake, CheckpointError | StorageError):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def error_of_ours(error: Exception) -> MhmoeError | None:
    """That of any rank inside an error of Ray Train's; when one rank fails, others fail in their exchanges with it."""
    causes = getattr(error, "worker_failures", {}).values()
    return next((cause for cause in causes if isinstance(cause, MhmoeError)), None)


class StreamFromNewest(ray.train.DataConfig):
    """Deals the training stream from the newest whole checkpoint on, to as many workers as a group has.

    Ray Train asks at every start of a group, when no worker runs, and here alone does it say how many there are. What
    is chosen is recorded, so that workers start where the stream does.
    """

    def __init__(self, run: RunDir, spec: RunSpec) -> None:
        super().__init__(execution_options=ray.data.ExecutionOptions(preserve_order=True))
        self._run, self._spec = run, spec

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> Any:
        """`datasets` has the names alone."""
        newest = newest_checkpoint(self._run, describe=describe_together)
        for error in newest.skipped if newest else []:
            print(f"warning: {error}")
            events.record(self._run, "skipped_checkpoint", name=error.what, reason=error.why)
        for folder in unfinished(self._run):
            remove_tree(folder)
        name, step, position = None, 0, 0
        if newest:
            name, step, position = newest.checkpoint.name, newest.manifest.step, newest.manifest.position
        events.record(self._run, "restoring", name=name, step=step)
        stream = training_stream(self._spec, position, world_size)
        return super().configure(dict.fromkeys(datasets, stream), world_size, *args, **kwargs)
