"""The dp x ep mesh of this process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from mhmoe_ray.errors import ClusterError
from mhmoe_ray.placement.groups import by_node, expert_groups
from mhmoe_ray.spec import ClusterSpec


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands. Without a process group (one worker) `devices` is None."""

    world: int
    rank: int
    ep: int
    ep_rank: int
    devices: DeviceMesh | None
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

    def group(self, dim: str) -> dist.ProcessGroup:
        """The process group of this rank along "dp" or "ep"."""
        assert self.devices is not None
        return self.devices.get_group(dim)

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
        return Mesh(1, 0, 1, 0, None, groups.ranks, nodes, 0, 0)
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % spec.ep or not spec.workers.min <= world <= spec.workers.max:
        raise ClusterError("worker group", f"it has {world} workers, not {spec.workers}", "resume the run")
    devices = DeviceMesh(device_type, torch.tensor(groups.ranks), mesh_dim_names=("dp", "ep"))
    ep_rank = next(group.index(rank) for group in groups.ranks if rank in group)
    return Mesh(world, rank, spec.ep, ep_rank, devices, groups.ranks, nodes, len(groups.straddling), len(groups.apart))
