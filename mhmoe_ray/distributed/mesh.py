"""The mesh of ranks from the view of this process.

The spec names the dimensions of the mesh and their sizes. The last dimension, ep, distributes the experts. Along all
others, ranks hold the same experts, so code that handles experts sees them as one dimension, expert_dp.

torch numbers the ranks of a process group in ascending order, so a rank's coordinate in the mesh is its rank in the
process group only if the rows and columns of the mesh ascend. If ranks of the same node form expert-parallel groups,
the rows ascend, but the columns may not:

    groups      [0, 3]        devices   [0, 2]      the same columns, which are the ranks that hold the same experts,
                [1, 2]                  [1, 3]      but sorted; the rows still ascend

So rows of tokens are exchanged in process groups formed from `groups`, and tensors are sharded over `devices`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mhmoe_ray.errors import ClusterError
from mhmoe_ray.planner.placement import expert_groups, ranks_by_node, sharding_groups
from mhmoe_ray.spec import ClusterSpec
from mhmoe_ray.spec.cluster import MeshSizes


@dataclass(frozen=True)
class Mesh:
    """Mesh of all ranks and this rank's coordinates. Without a process group, as with a single worker, device meshes
    are None and `process_groups` is empty."""

    sizes: MeshSizes
    groups: list[list[int]]  # ranks of each expert-parallel group
    nodes: Sequence[str]  # name of each rank's node
    rank: int = 0
    ep_rank: int = 0  # coordinate of this rank along ep
    devices: DeviceMesh | None = None
    """Device mesh "expert_dp" x "ep". Ranks along "ep" need not be an expert-parallel group."""
    shard_mesh: DeviceMesh | None = None
    """Device mesh over which fsdp shards tensors: all ranks or, with hybrid sharding, "replicas" and "shards"."""
    expert_mesh: DeviceMesh | None = None
    """Device mesh over which fsdp shards experts: `devices` or, with hybrid sharding, one that has "replicas" and
    "shards" in place of "expert_dp"."""
    process_groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    """Process groups of this rank by dimension; that of "ep" is its expert-parallel group."""
    straddling_count: int = 0  # expert-parallel groups on more than one node
    cross_domain_count: int = 0  # expert-parallel groups in several domains, within which the network is faster

    @property
    def uneven_count(self) -> int:
        """The number of expert-parallel groups that cannot have a hierarchical dispatch: with different numbers of
        ranks on their nodes, or with ranks not in the order of nodes."""
        return sum(ranks_by_node(group, self.nodes) is None for group in self.groups)

    @property
    def replicas(self) -> int:
        """The number of copies of the model's shards: 1, or with hybrid sharding that of shard groups."""
        if self.shard_mesh is None or self.shard_mesh.ndim == 1:
            return 1
        return self.shard_mesh.size(0)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def ep(self) -> int:
        """The number of ranks of an expert-parallel group."""
        return self.sizes["ep"]

    @property
    def expert_dp(self) -> int:
        """The number of ranks that hold the same experts."""
        return self.world_size // self.ep

    def group(self, dimension: Literal["expert_dp", "ep"]) -> dist.ProcessGroup:
        """Return this rank's process group along a dimension, of which there must be one."""
        return self.process_groups[dimension]

    def same_expert_ranks(self) -> list[int]:
        """Return the ranks that hold the same experts; there must be a process group."""
        assert self.devices is not None
        ranks: list[int] = self.devices["expert_dp"].mesh.tolist()
        return ranks

    def expert_ids(self, experts: int) -> range:
        """Return the global ids of this rank's experts, of `experts` in each layer."""
        experts_per_rank = experts // self.ep
        return range(self.ep_rank * experts_per_rank, (self.ep_rank + 1) * experts_per_rank)

    def expert_dtensor(self, local: torch.Tensor) -> torch.Tensor:
        """Return this rank's experts, [E/ep, ...], as a DTensor [E, ...], without a copy; without a process group, as
        they are."""
        if self.devices is None:
            return local
        from torch.distributed.tensor import DTensor, Replicate, Shard

        return DTensor.from_local(local, self.devices, [Replicate(), Shard(0)], run_check=False)


def build_mesh(spec: ClusterSpec, nodes: Sequence[str], device_type: str, domains: Sequence[str] | None = None) -> Mesh:
    """Return the mesh of the default process group, or of a single process if there is none.

    With a process group this is a collective operation. `domains` names the network domain of each rank's node; by
    default there is one. An expert-parallel group on several nodes while `spec.straddling` is refuse, or a number of
    ranks that `spec` does not allow, is a ClusterError.
    """
    groups = expert_groups(nodes, spec.ep, domains)
    if spec.straddling == "refuse" and groups.refusal_reason:
        remedy = "free whole nodes, lower cluster.ep, or set cluster.straddling to warn"
        raise ClusterError("placement", groups.refusal_reason, remedy)
    # A single worker has no process group.
    if not dist.is_initialized():
        return Mesh(dict.fromkeys(spec.mesh_sizes(), 1), groups.ranks, nodes)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % spec.ep or not spec.workers.min <= world_size <= spec.workers.max:
        raise ClusterError("worker group", f"it has {world_size} workers, not {spec.workers}", "resume the run")
    ranks = torch.tensor(groups.ranks)
    columns = ranks.sort(dim=0).values
    devices = DeviceMesh(device_type, columns, mesh_dim_names=("expert_dp", "ep"))
    process_groups = {name: devices.get_group(name) for name in ("expert_dp", "ep")}
    # If sorting has changed the columns, the rows of the mesh are not the expert-parallel groups, which then need
    # process groups of their own.
    if not torch.equal(columns, ranks):
        expert_group = create_process_group(groups.ranks)
        assert expert_group is not None
        process_groups["ep"] = expert_group
    if spec.shard_group is None or spec.shard_group == world_size:
        shard_mesh, expert_mesh = DeviceMesh(device_type, torch.arange(world_size), mesh_dim_names=("world",)), devices
    else:
        rank_RSE = torch.tensor(sharding_groups(groups.ranks, spec.shard_group))
        rank_RS = rank_RSE.flatten(1).sort(dim=1).values
        shard_mesh = DeviceMesh(device_type, rank_RS, mesh_dim_names=("replicas", "shards"))
        expert_mesh = DeviceMesh(device_type, rank_RSE, mesh_dim_names=("replicas", "shards", "ep"))
    return Mesh(
        sizes=spec.mesh_sizes(world_size),
        groups=groups.ranks,
        nodes=nodes,
        rank=rank,
        ep_rank=devices.get_local_rank("ep"),
        devices=devices,
        shard_mesh=shard_mesh,
        expert_mesh=expert_mesh,
        process_groups=process_groups,
        straddling_count=len(groups.straddling_indices),
        cross_domain_count=len(groups.cross_domain_indices),
    )


def create_process_group(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """Create a group for each list of ranks, and return this rank's, if any. This is a collective operation: all ranks
    must create the same groups in the same order."""
    return _new_groups(groups)[0]


# torch's function has no annotations, so its type is stated here.
_new_groups: Callable[[list[list[int]]], tuple[dist.ProcessGroup | None, Any]] = dist.new_subgroups_by_enumeration
