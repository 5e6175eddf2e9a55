"""As many workers as there is room for: what Ray Train does where `cluster.workers` is a range.

Ray Train's own policy takes any number between two and has no public hook. So this reaches into Ray 2.60;
tests/train/test_ray_trainer.py fails when what it holds on to moves.
"""

import time
from typing import Any

import ray
import ray.train
from ray._private.state import available_resources_per_node, state
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from mhmoe_ray.checkpoint.manifest import last_step
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.waiting import record_waiting


class AllowedSizes(ElasticScalingPolicy):
    """The largest allowed number of workers that there is room for.

    Ray ends a group to let it grow, in the middle of a step. So growth is considered once after each checkpoint, seen
    within a poll: what was trained since is done again, and nothing else is lost. A healthy group never shrinks.
    """

    def __init__(self, scaling_config: ray.train.ScalingConfig, run: RunDir, spec: RunSpec) -> None:
        super().__init__(scaling_config)
        self._run, self._steps, self._sizes = run, spec.train.steps, spec.worker_counts
        self._considered, self._waits = -1, False
        self._holding: int | None = 0
        """Workers whose resources are not among the free ones; None where a group that failed may still have its."""

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
                record_waiting(self._run)
            self._waits = True
            time.sleep(1.0)  # Ray asks again at once
        return decision

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Ray goes by what it reserved, on nodes that are dying or held by others too, and up to 20 s ago."""
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
