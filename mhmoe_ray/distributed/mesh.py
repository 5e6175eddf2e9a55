"""The mesh of ranks, as this process sees it; its dimensions are accessed by name, today dp and ep.

torch numbers the ranks of a process group in ascending order, whatever order a mesh has them in. Only in a mesh whose
rows and columns both ascend is a rank's coordinate in the mesh also its rank in the process group. Groups formed by
node have rows that ascend, but not columns:

    groups      [0, 3]        devices   [0, 2]      ranks that hold the same experts: the same columns, each sorted,
                [1, 2]                  [1, 3]      which leaves the rows ascending

So rows of tokens are exchanged in process groups made from `groups`, and tensors are sharded over `devices`.
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
    """Mesh of all ranks and the place of this rank in it.

    Without a process group (one worker) `devices` is None.
    """

    sizes: MeshSizes
    rank: int
    coordinates: dict[str, int]
    """Coordinate of this rank along each dimension."""
    devices: DeviceMesh | None
    """Device mesh with the same dimensions. Ranks along "dp" hold the same experts; its rows along "ep" need not be the
    expert-parallel groups."""
    everyone: DeviceMesh | None
    """Device mesh of all ranks in one dimension; None without a process group."""
    process_groups: dict[str, dist.ProcessGroup]
    """Process group of this rank along each dimension; along "ep" it is the expert-parallel group. Empty without a
    process group."""
    groups: list[list[int]]
    """Ranks of each expert-parallel group."""
    nodes: Sequence[str]
    """Name of each rank's node."""
    straddling: int
    """Number of expert-parallel groups that lie on more than one node."""
    apart: int
    """Number of expert-parallel groups that lie in more than one domain."""

    @property
    def uneven(self) -> int:
        """Number of expert-parallel groups that do not have equally many ranks on each of their nodes, one node after
        the other."""
        return sum(by_node(group, self.nodes) is None for group in self.groups)

    @property
    def world(self) -> int:
        return math.prod(self.sizes.values())

    def size(self, dimension: str) -> int:
        """Return the size of the mesh, that is the number of ranks, along a dimension."""
        return self.sizes[dimension]

    def group(self, dimension: str) -> dist.ProcessGroup:
        """Return this rank's process group along a dimension."""
        return self.process_groups[dimension]

    def ranks(self, dimension: str) -> list[int]:
        """Return the ranks of `devices` along a dimension, through this rank."""
        assert self.devices is not None
        ranks: list[int] = self.devices[dimension].mesh.tolist()
        return ranks

    def held(self, experts: int) -> range:
        """Return the global ids of the experts of each layer that this rank holds.

        Args:
            experts: number of experts of a layer.
        """
        each = experts // self.size("ep")
        return range(self.coordinates["ep"] * each, (self.coordinates["ep"] + 1) * each)

    def expert_dtensor(self, local: torch.Tensor) -> torch.Tensor:
        """Return this rank's experts [E/ep, ...] as a view of the global [E, ...]; without a process group, the tensor
        itself."""
        if self.devices is None:
            return local
        placements = [Shard(0) if name == "ep" else Replicate() for name in self.sizes]
        return DTensor.from_local(local, self.devices, placements, run_check=False)


def build_mesh(spec: ClusterSpec, nodes: Sequence[str], device_type: str, domains: Sequence[str] | None = None) -> Mesh:
    """Build the mesh of the default process group, or of a single process if there is none.

    Args:
        spec: cluster section of the spec; its `workers` must allow the size of the group.
        nodes: name of each rank's node.
        device_type: "cpu" or "cuda".
        domains: name of the domain of each rank's node; by default all nodes are in one domain.

    Raises:
        ClusterError: a group lies farther apart than `spec.straddling` allows, or the worker group has a size that
            `spec` does not allow.
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
    """Create a process group for each list of ranks and return the one that this rank is in; None if it is in none.

    All ranks must create the same groups in the same order.
    """
    return _new_groups(groups)[0]


_new_groups: Callable[[list[list[int]]], tuple[dist.ProcessGroup | None, Any]] = dist.new_subgroups_by_enumeration
