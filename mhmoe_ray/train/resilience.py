"""Ray Train policies of a run: the retry policy for failures, and the scaling policy for the number of workers.

Ray Train's own scaling policy takes any number of workers between two bounds, but the number must divide the step's
micro-batches. Ray has no public hook for either policy, so this module uses Ray's private interfaces (ray_compat.py).
ray_compat.py fails when Ray moves or changes one of these interfaces.
"""

import errno
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mhmoe_ray.checkpoint.manifest import last_step
from mhmoe_ray.errors import CheckpointError, MhmoeError, StorageError
from mhmoe_ray.planner.placement import Node, capacity_shortfall
from mhmoe_ray.ray_compat import (
    ENABLE_NCCL_HANG_DETECTOR_ENV_VAR,
    NCCL_RAS_CONFIRM_DURATION_S_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    DataParallelTrainer,
    DefaultFailurePolicy,
    ElasticScalingPolicy,
    FailureDecision,
    NoopDecision,
    PlacementGroupCleanerCallback,
    ResizeDecision,
    ScalingDecision,
    WorkerGroupStartupTimeoutError,
    available_resources_per_node,
)
from mhmoe_ray.remote import LOCAL_CLUSTER
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.placement import START_TIMEOUT_SECONDS, PlacingController, usable_nodes
from mhmoe_ray.train.rendezvous import RankConfig


def missing_resources(spec: RunSpec) -> str:
    """Return one line on why the cluster has no room for the fewest workers with which a run can start."""
    cluster, node_resources = spec.cluster, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [Node("", resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in node_resources]
    shortage = capacity_shortfall(nodes, cluster.cpus_per_worker, cluster.gpus_per_worker, spec.worker_counts[0])
    return shortage or "others use the CPUs or GPUs that it needs"


def record_waiting(run: RunDir, spec: RunSpec) -> None:
    """Record that the workers wait for resources, because Ray Train retries without end and reports nothing. A wait is
    recorded once; if it cannot be recorded, a warning is printed."""
    try:
        if events.state(events.read(run)) != "waiting":
            events.record(run, "waiting", missing=missing_resources(spec))
    except (OSError, StorageError) as e:
        # A missing event must not fail the run: the workers go on waiting and start when there are resources.
        print(f"warning: the workers wait for resources, but the event cannot be recorded: {e}")


# Longest wait for the run directory before a retry, and the time between two attempts to read it.
STORAGE_TIMEOUT_SECONDS, STORAGE_CHECK_SECONDS = 600.0, 5.0


class NonRetryableFailurePolicy(DefaultFailurePolicy):
    """Retry policy of a worker group that raises errors of this package, which would occur again.

    An example is a gradient that is not finite. All other failures, such as killed workers, are retried within the
    spec's limit. So are errors of storage or of a checkpoint, because the storage may come back, unless a disk is full.
    """

    def __init__(self, failure_config: FailureConfig, run: RunDir, spec: RunSpec) -> None:
        super().__init__(failure_config)
        self._run, self._spec = run, spec

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Decide to retry or to raise. Wait for the storage before a retry, and record a wait for resources."""
        if isinstance(getattr(training_failed_error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            record_waiting(self._run, self._spec)
        error = package_error(training_failed_error)
        if _is_disk_full(training_failed_error) or (error and not isinstance(error, CheckpointError | StorageError)):
            return FailureDecision.RAISE
        _wait_for_storage(self._run)
        return super().make_decision(training_failed_error)


def _wait_for_storage(run: RunDir) -> None:
    # Each new worker group first reads the run directory. Without this wait, new groups would fail at once while the
    # storage is unavailable, and a short outage would use up all retries.
    deadline = time.monotonic() + STORAGE_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            run.spec_file.read_bytes()
            return
        except FileNotFoundError:
            # The run directory was removed, so there is nothing to wait for. The new worker group will report this.
            return
        except OSError as e:
            print(f"warning: the workers start again when the run directory can be read: {e}")
            time.sleep(STORAGE_CHECK_SECONDS)


def _is_disk_full(error: Exception) -> bool:
    """Return whether a rank or Ray Train itself failed because a disk or a quota is full."""
    causes = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    # Errors of this package, of torch and of the system all have the text of the error number.
    return any(os.strerror(number) in str(cause) for cause in causes for number in (errno.ENOSPC, errno.EDQUOT))


def package_error(error: Exception) -> MhmoeError | None:
    """Return the first error of this package among the ranks' errors in an error of Ray Train; None if it has none."""
    # All ranks are searched, because any rank may hold the error: when one rank fails, the others fail too, in their
    # collective operations with it.
    rank_errors = getattr(error, "worker_failures", {}).values()
    return next((rank_error for rank_error in rank_errors if isinstance(rank_error, MhmoeError)), None)


class DivisorScalingPolicy(ElasticScalingPolicy):
    """Scaling policy that chooses the largest allowed number of workers for which there are resources. It considers
    growth once after each checkpoint, and never shrinks a healthy worker group."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, run: RunDir, spec: RunSpec) -> None:
        super().__init__(scaling_config)
        self._run, self._spec, self._last_step, self._worker_counts = run, spec, spec.train.steps, spec.worker_counts
        self._considered_step, self._is_waiting = -1, False
        self._held_workers: int | None = 0
        """Number of workers whose resources this run holds itself, which are not free in the cluster; None if a failed
        worker group may still hold its resources."""

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Decide to grow if there is a new checkpoint and room for more workers, and otherwise to do nothing."""
        # Ray's request for resources expires unless it is repeated, so it is sent at every poll.
        self._maybe_send_resource_request()
        self._held_workers = None
        worker_count = worker_group_state.num_workers
        try:
            checkpoint_step = last_step(self._run)
            is_ending = checkpoint_step >= self._last_step or self._run.stop_file.exists()
        except OSError:
            # The workers do not need the run directory at the moment, so they train on. The directory is read again at
            # the next poll.
            return NoopDecision()
        # To let a worker group grow, Ray ends it in the middle of a step, and the steps since the last checkpoint are
        # repeated. Growth is considered only when a new checkpoint appears, because then the fewest steps are repeated.
        if checkpoint_step == self._considered_step or is_ending:
            return NoopDecision()
        self._considered_step, self._held_workers = checkpoint_step, worker_count
        decision: ScalingDecision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        self._held_workers = None
        return (
            decision if isinstance(decision, ResizeDecision) and decision.num_workers > worker_count else NoopDecision()
        )

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Decide to start as many workers as possible or, with too few resources, to wait and record that."""
        decision: ScalingDecision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            # If this start of workers fails, other jobs may hold the resources. With 0 held workers, the next decision
            # counts free resources only.
            self._held_workers = 0
            self._is_waiting = False
        else:
            if not self._is_waiting:
                record_waiting(self._run, self._spec)
            self._is_waiting = True
            # Ray asks for the next decision at once, so without this pause it would ask in a busy loop.
            time.sleep(1.0)
        return decision

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Return the largest allowed number of workers for which live, not draining nodes have resources; 0 if none
        fits. Only free resources and this run's own count, unless a failed worker group may still hold some. One CPU is
        left for the data stream."""
        # Ray's own count uses `reserved_resources`, which may be 20 s old. Since then nodes may have died, or others
        # may have taken resources. So the nodes are read anew here.
        nodes = {node["NodeID"]: node["Resources"] for node in usable_nodes()}
        possible_workers, counted_nodes = int(super()._count_possible_workers(nodes)), nodes
        if self._held_workers is not None:
            free_resources = available_resources_per_node()
            free_nodes = {n: free_resources.get(n, {}) for n in nodes}
            possible_workers = min(
                possible_workers, self._held_workers + int(super()._count_possible_workers(free_nodes))
            )
            if self._held_workers == 0:
                counted_nodes = free_nodes
        # One CPU stays free for the data stream. Without it no step would begin. While this run has workers, its stream
        # uses CPUs, too. Ray does not tell them apart from the CPUs of other jobs, so all CPUs of the nodes count then.
        usable_cpus = sum(resources.get("CPU", 0.0) for resources in counted_nodes.values())
        possible_workers = min(possible_workers, int((usable_cpus - 1) // self._spec.cluster.cpus_per_worker))
        return max((count for count in self._worker_counts if count <= possible_workers), default=0)


class RunTrainer(DataParallelTrainer):
    """Ray Train trainer with a retry policy and, if the number of workers is a range, a scaling policy of its own."""

    def __init__(self, run: RunDir, spec: RunSpec, **options: Any) -> None:
        super().__init__(_train_worker, backend_config=RankConfig(), **options)
        self._run, self._spec = run, spec

    def _create_default_callbacks(self) -> list[Any]:
        if self._spec.cluster.gpus_per_worker and math.isfinite(self._spec.cluster.hang_seconds):
            # Ray asks NCCL for the counts of collectives and, if they differ between ranks for a while, writes NCCL's
            # report and stacks into the run's folder `ray`. That must come before the watchdog kills a rank.
            os.environ.setdefault(ENABLE_NCCL_HANG_DETECTOR_ENV_VAR, "1")
            seconds = self._spec.cluster.hang_seconds / 2
            os.environ.setdefault(NCCL_RAS_CONFIRM_DURATION_S_ENV_VAR, str(seconds))
        # PlacementGroupCleanerCallback is left out. It starts a process on the head node that asks every second whether
        # Ray Train's controller is alive, and frees the controller's resources when it has died. Here the job ends with
        # its controller, and Ray then frees the resources.
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        # By default Ray gives the controller environment variables of this job, and all processes of the run inherit
        # them. Ray starts a process with such variables twice. On a local cluster, all processes have them already.
        environment = {} if LOCAL_CLUSTER in os.environ else {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
        options["failure_policy"] = NonRetryableFailurePolicy(self.run_config.failure_config, self._run, self._spec)
        cluster, timeout = self._spec.cluster, WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
        if cluster.workers.is_elastic or cluster.placement == "planned":
            environment[timeout] = os.environ.get(timeout, str(START_TIMEOUT_SECONDS))
        if cluster.workers.is_elastic:
            options["scaling_policy"] = DivisorScalingPolicy(self.scaling_config, self._run, self._spec)
        # The controller runs on the job's own node.
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        controller_class = ray.remote(num_cpus=0, scheduling_strategy=node, runtime_env={"env_vars": environment})
        controller = controller_class(PlacingController).remote(cluster, **options)
        self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


def _train_worker(config: dict[str, Any]) -> None:
    # Ray starts processes for the stream at the first call of `get_dataset_shard`. They start while this process
    # imports torch and makes the model.
    executor = ThreadPoolExecutor(1)
    shard = executor.submit(ray.train.get_dataset_shard, "train")
    executor.shutdown(wait=False)
    # Only workers import torch. The import takes seconds, which would delay the job's request for workers.
    from ray.train.torch.config import TorchConfigContextManager

    from mhmoe_ray.train.worker import train_worker

    with TorchConfigContextManager():
        train_worker(config, shard)
