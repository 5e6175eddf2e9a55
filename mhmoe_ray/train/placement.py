"""Placement of a run's workers on nodes of the cluster, planned anew at each start of a worker group."""

import os
import time
from collections import Counter
from typing import Any

import ray

from mhmoe_ray.planner.placement import Node, place_workers
from mhmoe_ray.ray_compat import (
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    TrainController,
    WorkerGroupStartupTimeoutError,
    available_resources_per_node,
    state,
)
from mhmoe_ray.spec import ClusterSpec

START_TIMEOUT_SECONDS = 15.0
"""Time after which a start of workers is given up and planned again. Ray's default is 60 s, but a node that has died is
noticed after about 20 s, and a plan may rely on it."""
POLL_SECONDS = 0.5
"""Time between two reads of free resources, which must agree."""

NODE_ID_LABEL = "ray.io/node-id"
"""Label that Ray gives each node."""


class PlacingController(TrainController):
    """Ray Train's controller, with a node or domain for each worker.

    Ray's own list of label selectors belongs to the `ScalingConfig`: it is fixed for the largest number of workers, and
    Ray also sends it to the autoscaler, which would wait for a node that is gone. So the list is set here, in the
    controller's copy, before each start.
    """

    def __init__(self, cluster: ClusterSpec, **options: Any) -> None:
        super().__init__(**options)
        self._cluster = cluster
        self._rank_nodes: list[Node] = []

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> None:
        self._rank_nodes = plan_worker_group(self._cluster, num_workers, self._rank_nodes)
        self._train_run_context.scaling_config.label_selector = _label_selectors(self._cluster, self._rank_nodes)
        super()._start_worker_group(num_workers, resources_per_worker)


def plan_worker_group(cluster: ClusterSpec, workers: int, earlier_rank_nodes: list[Node]) -> list[Node]:
    """Return the node of each worker of a new group, named by Ray's id; an empty list leaves the choice to Ray.

    It waits until the nodes have room, and until what the earlier group held is free, which takes seconds on a busy
    machine. After `START_TIMEOUT_SECONDS` without room it raises Ray's error for a start that takes too long, or leaves
    the choice to Ray if an autoscaler can bring nodes.
    """
    # With one node there is no choice.
    if cluster.placement == "pack" or (len(usable_nodes()) == 1 and not _has_autoscaler()):
        return []
    timeout = float(os.environ.get(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, START_TIMEOUT_SECONDS))
    deadline = time.monotonic() + timeout
    held_slots = Counter(node.name for node in earlier_rank_nodes)
    slots: dict[str, int] = {}
    while True:
        nodes, earlier_slots = _free_nodes(cluster), slots
        slots = {node.name: node.worker_capacity(cluster.cpus_per_worker, cluster.gpus_per_worker) for node in nodes}
        are_settled = slots == earlier_slots and all(slots[name] >= held_slots[name] for name in slots)
        is_late = time.monotonic() > deadline
        rank_nodes = place_workers(nodes, cluster, workers)
        if len(rank_nodes) == workers and (are_settled or is_late):
            return rank_nodes
        if is_late and _has_autoscaler():
            return []
        if is_late:
            raise WorkerGroupStartupTimeoutError(num_workers=workers)
        time.sleep(POLL_SECONDS)


def _label_selectors(cluster: ClusterSpec, rank_nodes: list[Node]) -> list[dict[str, str]] | None:
    """Return a label selector for each worker; None if Ray chooses."""
    if not rank_nodes:
        return None
    if not _has_autoscaler():
        return [{NODE_ID_LABEL: node.name} for node in rank_nodes]
    # If a node dies, the autoscaler replaces it by another node of the domain.
    label = cluster.domain_label
    return [{label: node.domain} if label and node.domain else {} for node in rank_nodes]


def _has_autoscaler() -> bool:
    return state.get_max_resources_from_cluster_config() is not None


def usable_nodes() -> list[dict[str, Any]]:
    """Return Ray's descriptions of the live nodes that are not being drained."""
    draining_nodes = state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining_nodes]


def _free_nodes(cluster: ClusterSpec) -> list[Node]:
    """Return the usable nodes with their free CPUs and GPUs, named by Ray's id."""
    free_resources = available_resources_per_node()
    nodes = []
    for node in usable_nodes():
        resources = free_resources.get(node["NodeID"], {})
        domain = node["Labels"].get(cluster.domain_label, "") if cluster.domain_label else ""
        nodes.append(Node(node["NodeID"], resources.get("CPU", 0.0), resources.get("GPU", 0.0), domain))
    return nodes
