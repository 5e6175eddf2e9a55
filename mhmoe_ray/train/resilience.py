"""Ray Train policies of a run: which failures are retried, and how many workers there are.

None of these has a public hook, so this module uses Ray's private interfaces (ray_compat.py);
tests/train/test_ray_trainer.py fails when an interface that it relies on moves.

Elastic sizes need a policy of their own because Ray Train's policy takes any number of workers between two bounds.
"""

import os
import time
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer

from mhmoe_ray.checkpoint.manifest import last_step
from mhmoe_ray.errors import CheckpointError, MhmoeError, StorageError
from mhmoe_ray.planner.placement import Node, missing_room
from mhmoe_ray.ray_compat import (
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    DefaultFailurePolicy,
    ElasticScalingPolicy,
    FailureDecision,
    NoopDecision,
    PlacementGroupCleanerCallback,
    ResizeDecision,
    ScalingDecision,
    WorkerGroupStartupTimeoutError,
    available_resources_per_node,
    state,
)
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec


def missing_now(spec: RunSpec) -> str:
    """Return in one line what the cluster of this process lacks for the smallest number of workers of a run.

    If its nodes are large enough, the line says that others use the resources.
    """
    cluster, alive = spec.cluster, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [Node("", each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in alive]
    missing = missing_room(nodes, cluster.cpus_per_worker, cluster.gpus_per_worker, spec.worker_counts[0])
    return missing or "others use the CPUs or GPUs that it needs"


def record_waiting(run: RunDir, spec: RunSpec) -> None:
    """Record that the workers wait for resources and what the cluster lacks, unless this is recorded already.

    Ray Train retries without end and reports nothing. If the event cannot be recorded, a warning is printed.
    """
    try:
        if events.state(events.events(run)) != "waiting":
            events.record(run, "waiting", missing=missing_now(spec))
    except (OSError, StorageError) as e:  # no reason not to wait
        print(f"warning: the workers wait for room, but {e}")


STORAGE_SECONDS, LOOK_SECONDS = 600.0, 5.0


class MistakesAreFinal(DefaultFailurePolicy):
    """Failure policy that does not retry workers that raised an error of this package.

    A new worker group would only meet such an error again, for example a gradient that is not finite. All other
    failures are retried: workers that were killed, and errors of storage or of a checkpoint, because the storage may
    come back.
    """

    def __init__(self, failure_config: FailureConfig, run: RunDir, spec: RunSpec) -> None:
        super().__init__(failure_config)
        self._run, self._spec = run, spec

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if isinstance(getattr(training_failed_error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            record_waiting(self._run, self._spec)
        mistake = error_of_ours(training_failed_error)
        if mistake and not isinstance(mistake, CheckpointError | StorageError):
            return FailureDecision.RAISE
        _wait_for_storage(self._run)
        return super().make_decision(training_failed_error)


def _wait_for_storage(run: RunDir) -> None:
    """Wait until the run directory can be read, for at most `STORAGE_SECONDS`.

    Each new worker group reads the run directory at once, and would fail. If the run was removed, return at once: the
    new worker group reports it.
    """
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
    """Return the first error of this package that a rank raised, from an error of Ray Train; None if there is none.

    All ranks are searched: when one rank fails, others fail in their collective operations with it.
    """
    causes = getattr(error, "worker_failures", {}).values()
    return next((cause for cause in causes if isinstance(cause, MhmoeError)), None)


class AllowedSizes(ElasticScalingPolicy):
    """Scaling policy that chooses the largest allowed number of workers for which there are resources.

    Ray ends a worker group in the middle of a step to let it grow. So growth is considered once after each checkpoint,
    which is noticed within one poll: the steps since the checkpoint are repeated, and nothing else is lost. A healthy
    worker group never shrinks.
    """

    def __init__(self, scaling_config: ray.train.ScalingConfig, run: RunDir, spec: RunSpec) -> None:
        super().__init__(scaling_config)
        self._run, self._spec, self._steps, self._sizes = run, spec, spec.train.steps, spec.worker_counts
        self._considered, self._waits = -1, False
        self._holding: int | None = 0
        """Number of workers whose resources are not among the free ones; None where a failed worker group may still
        hold its own."""

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._maybe_send_resource_request()  # it would expire
        self._holding = None
        now = worker_group_state.num_workers
        try:
            saved = last_step(self._run)
            over = saved >= self._steps or self._run.stop_file.exists()
        except OSError:  # the storage is asked again at the next poll
            return NoopDecision()
        if saved == self._considered or over:
            return NoopDecision()
        self._considered, self._holding = saved, now
        decision: ScalingDecision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        self._holding = None
        return decision if isinstance(decision, ResizeDecision) and decision.num_workers > now else NoopDecision()

    def make_decision_for_non_running_worker_group(self) -> Any:
        decision: ScalingDecision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self._holding = 0  # if this start fails, for what others hold, the next one is of what is free
            self._waits = False
        else:
            if not self._waits:
                record_waiting(self._run, self._spec)
            self._waits = True
            time.sleep(1.0)  # Ray asks again at once
        return decision

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Return the largest allowed number of workers for which there are resources; 0 if no allowed number fits.

        Ray's own count goes by resources that it reserved up to 20 s ago, also on nodes that are dying or that others
        use. This count takes nodes that are alive and not draining; unless a failed worker group may still hold
        resources, it is also limited to those that are free now. One CPU is left for the data stream.
        """
        leaving = state.get_draining_nodes()
        nodes = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving}
        room = int(super()._count_possible_workers(nodes))
        if self._holding is not None:
            free = available_resources_per_node()
            room = min(room, self._holding + super()._count_possible_workers({n: free.get(n, {}) for n in nodes}))
        cpus = sum(resources.get("CPU", 0.0) for resources in nodes.values())
        # One is for the stream, or no step would begin.
        room = min(room, int((cpus - 1) // self.scaling_config._resources_per_worker_not_none["CPU"]))
        return max((size for size in self._sizes if size <= room), default=0)


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
        given["failure_policy"] = MistakesAreFinal(self.run_config.failure_config, self._run, self._spec)
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
