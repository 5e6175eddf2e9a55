"""Ray Train's trainer with a run's own rules: which failures are tried again, how large a group of workers is, and what
runs beside it.

None of these has a public hook. So this reaches into Ray 2.60; tests/train/test_ray_trainer.py fails when what it holds
on to moves.
"""

import os
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.elastic import AllowedSizes
from mhmoe_ray.train.retries import MistakesAreFinal


class RunTrainer(TorchTrainer):
    def __init__(self, run: RunDir, spec: RunSpec, **given: Any) -> None:
        super().__init__(_train_worker, **given)
        self._run, self._spec = run, spec

    def _create_default_callbacks(self) -> list[Any]:
        # It frees what workers had of a controller that died: by a process of each run on the head, which asks for the
        # controller every second. Ours is of the run's job, which ends with it, and with the job all that it reserved.
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = MistakesAreFinal(self.run_config.failure_config, self._run)
        if self._spec.cluster.workers.elastic:
            # For a placement that was counted beforehand. One that waits counts on a node that is dead without Ray
            # knowing it, for some 20 s; for as long as Ray would wait, nobody would train.
            os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, "15")
            given["scaling_policy"] = AllowedSizes(self.scaling_config, self._run, self._spec)
        return super()._initialize_and_run_controller(**given)


def _train_worker(config: dict[str, Any]) -> None:
    # Imported only by workers: it takes a second, in which the job would not even have asked for them.
    from mhmoe_ray.train.worker import train_worker

    train_worker(config)
