"""The dp x ep mesh of this process.

torch numbers the ranks of a process group upwards, whatever order a mesh has them in; only in a mesh whose rows and
columns both ascend is a place in the mesh the place in the group. Groups by node give rows that ascend, not columns:

    groups      [0, 3]        devices   [0, 2]      who holds which experts: the same columns, each sorted, which leaves
                [1, 2]                  [1, 3]      the rows ascending

So rows are exchanged in process groups of the groups, and tensors are sliced over `devices`.
"""

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


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands. Without a process group (one worker) `devices` is None."""

    world: int
    rank: int
    ep: int
    ep_rank: int
    devices: DeviceMesh | None
    """Of dims "dp" and "ep": ranks of a column hold the same experts. Its rows need not be the groups."""
    everyone: DeviceMesh | None
    """All ranks, in one dimension."""
    ep_group: dist.ProcessGroup | None
    """The expert-parallel group of this rank."""
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
    def dp(self) -> int:
        return self.world // self.ep

    def held(self, experts: int) -> range:
        """Global ids of the experts of each layer that this rank holds."""
        each = experts // self.ep
        return range(self.ep_rank * each, (self.ep_rank + 1) * each)

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same experts as this one."""
        assert self.devices is not None
        return self.devices.get_group("dp")

    def expert_dtensor(self, local: torch.Tensor) -> torch.Tensor:
        """A rank's experts [E/ep, ...] as a view of the global [E, ...]; the tensor itself when it holds all."""
        if self.devices is None:
            return local
        placements = [Replicate(), Shard(0)]
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
            world=1,
            rank=0,
            ep=1,
            ep_rank=0,
            devices=None,
            everyone=None,
            ep_group=None,
            groups=groups.ranks,
            nodes=nodes,
            straddling=0,
            apart=0,
        )
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % spec.ep or not spec.workers.min <= world <= spec.workers.max:
        raise ClusterError("worker group", f"it has {world} workers, not {spec.workers}", "resume the run")
    ranks = torch.tensor(groups.ranks)
    devices = DeviceMesh(device_type, ranks.sort(dim=0).values, mesh_dim_names=("dp", "ep"))
    everyone = DeviceMesh(device_type, torch.arange(world), mesh_dim_names=("world",))
    rows_are_groups = torch.equal(devices.mesh, ranks)
    return Mesh(
        world=world,
        rank=rank,
        ep=spec.ep,
        ep_rank=next(group.index(rank) for group in groups.ranks if rank in group),
        devices=devices,
        everyone=everyone,
        ep_group=devices.get_group("ep") if rows_are_groups else group_of(groups.ranks),
        groups=groups.ranks,
        nodes=nodes,
        straddling=len(groups.straddling),
        apart=len(groups.apart),
    )


def group_of(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """This rank's of several new process groups, which all ranks make in the same order; None if it is in none."""
    return _new_groups(groups)[0]


_new_groups: Callable[[list[list[int]]], tuple[dist.ProcessGroup | None, Any]] = dist.new_subgroups_by_enumeration
