"""The mesh of ranks, as this process sees it; its dimensions are asked for by name, today dp and ep.

torch numbers the ranks of a process group upwards, whatever order a mesh has them in; only in a mesh whose rows and
columns both ascend is a place in the mesh the place in the group. Groups by node give rows that ascend, not columns:

    groups      [0, 3]        devices   [0, 2]      who holds which experts: the same columns, each sorted, which leaves
                [1, 2]                  [1, 3]      the rows ascending

So rows are exchanged in process groups of the groups, and tensors are sliced over `devices`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from mhmoe_ray.errors import ClusterError
from mhmoe_ray.planner.placement import by_node, expert_groups
from mhmoe_ray.spec import ClusterSpec
from mhmoe_ray.spec.cluster import MeshSizes


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands. Without a process group (one worker) `devices` is None."""

    sizes: MeshSizes
    rank: int
    coordinates: dict[str, int]
    """Where this rank stands along each dimension."""
    devices: DeviceMesh | None
    """Of the same dimensions. Ranks along "dp" hold the same experts; its rows along "ep" need not be the groups."""
    everyone: DeviceMesh | None
    """All ranks, in one dimension."""
    process_groups: dict[str, dist.ProcessGroup]
    """Of this rank along each dimension; that of "ep" is its expert-parallel group. Empty without a process group."""
    groups: list[list[int]]
    """Ranks of each expert-parallel group."""
    nodes: Sequence[str]
    """For each rank, a name of its node."""
    straddling: int
    """Expert-parallel groups that lie on more than one node."""
    apart: int
    """Those of them that lie in more than one domain."""

    @property
    def uneven(self) -> int:
        """Expert-parallel groups whose nodes have unequally many of their ranks."""
        return sum(by_node(group, self.nodes) is None for group in self.groups)

    @property
    def world(self) -> int:
        return math.prod(self.sizes.values())

    def size(self, dimension: str) -> int:
        """Return the number of ranks along a dimension."""
        return self.sizes[dimension]

    def group(self, dimension: str) -> dist.ProcessGroup:
        """Return this rank's process group along a dimension."""
        return self.process_groups[dimension]

    def ranks(self, dimension: str) -> list[int]:
        """Return the ranks of the devices along a dimension, through this one."""
        assert self.devices is not None
        ranks: list[int] = self.devices[dimension].mesh.tolist()
        return ranks

    def held(self, experts: int) -> range:
        """Global ids of the experts of each layer that this rank holds."""
        each = experts // self.size("ep")
        return range(self.coordinates["ep"] * each, (self.coordinates["ep"] + 1) * each)

    def expert_dtensor(self, local: torch.Tensor) -> torch.Tensor:
        """A rank's experts [E/ep, ...] as a view of the global [E, ...]; the tensor itself when it holds all."""
        if self.devices is None:
            return local
        placements = [Shard(0) if name == "ep" else Replicate() for name in self.sizes]
        return DTensor.from_local(local, self.devices, placements, run_check=False)


def build_mesh(spec: ClusterSpec, nodes: Sequence[str], device_type: str, domains: Sequence[str] | None = None) -> Mesh:
    """The mesh of the default process group, or of a single process if there is none.

    Args:
        spec: its `workers` must allow the size of the group.
        nodes: for each rank, a name of the node it is on.
        device_type: "cpu" or "cuda".
        domains: for each rank, a name of the domain that its node is in; by default all are in one.

    Raises:
        ClusterError: a group lies farther apart than `spec.straddling` allows, or the worker group has another size.
    """
    groups = expert_groups(nodes, spec.ep, domains)
    if spec.straddling == "refuse" and groups.why_refused:
        fix = "free whole nodes, lower cluster.ep, or set cluster.straddling to warn"
        raise ClusterError("placement", groups.why_refused, fix)
    if not dist.is_initialized():
        return Mesh(
            sizes=dict.fromkeys(spec.mesh_sizes(), 1),
            rank=0,
            coordinates=dict.fromkeys(spec.mesh_sizes(), 0),
            devices=None,
            everyone=None,
            process_groups={},
            groups=groups.ranks,
            nodes=nodes,
            straddling=0,
            apart=0,
        )
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % spec.ep or not spec.workers.min <= world <= spec.workers.max:
        raise ClusterError("worker group", f"it has {world} workers, not {spec.workers}", "resume the run")
    sizes = spec.mesh_sizes(world)
    ranks = torch.tensor(groups.ranks)
    columns = ranks.sort(dim=0).values
    devices = DeviceMesh(device_type, columns.reshape(*sizes.values()), mesh_dim_names=tuple(sizes))
    process_groups = {name: devices.get_group(name) for name in sizes}
    if not torch.equal(columns, ranks):
        expert_group = group_of(groups.ranks)
        assert expert_group is not None
        process_groups["ep"] = expert_group
    return Mesh(
        sizes=sizes,
        rank=rank,
        coordinates={name: devices.get_local_rank(name) for name in sizes},
        devices=devices,
        everyone=DeviceMesh(device_type, torch.arange(world), mesh_dim_names=("world",)),
        process_groups=process_groups,
        groups=groups.ranks,
        nodes=nodes,
        straddling=len(groups.straddling),
        apart=len(groups.apart),
    )


def group_of(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """This rank's of several new process groups, which all ranks make in the same order; None if it is in none."""
    return _new_groups(groups)[0]


_new_groups: Callable[[list[list[int]]], tuple[dist.ProcessGroup | None, Any]] = dist.new_subgroups_by_enumeration
