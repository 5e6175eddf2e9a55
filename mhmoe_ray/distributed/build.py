"""Build a rank's dispatch and strategy as the spec names them, in `cluster.dispatch` and `cluster.strategy`."""

from mhmoe_ray.distributed.dispatch.flat import FlatDispatch
from mhmoe_ray.distributed.dispatch.hierarchical import HierarchicalDispatch
from mhmoe_ray.distributed.mesh import Mesh, group_of
from mhmoe_ray.distributed.strategies.ddp import Fill, Strategy
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.planner.placement import by_node
from mhmoe_ray.spec import ClusterSpec, RunSpec


def build_dispatch(spec: ClusterSpec, mesh: Mesh) -> FlatDispatch | HierarchicalDispatch | None:
    """Build the expert-parallel dispatch of this rank; return None where every rank holds all experts.

    This is a collective operation. Where `spec.dispatch` is hierarchical, a group within one node stays flat, and so
    does a group with unequal numbers of ranks on its nodes (`Mesh.uneven`). Both dispatches give the same results, so
    the placement that a restarted worker group happens to get is no reason to end its run.
    """
    if mesh.size("ep") == 1:
        return None
    if spec.dispatch == "hierarchical":
        # Groups of processes are made by all ranks, in the same order.
        grids = [grid for group in mesh.groups if (grid := by_node(group, mesh.nodes)) and len(grid) > 1]
        if grids:
            node = group_of([ranks for grid in grids for ranks in grid])
            rail = group_of([list(ranks) for grid in grids for ranks in zip(*grid, strict=True)])
            if node is not None and rail is not None:
                return HierarchicalDispatch(node, rail)
    own = next(group for group in mesh.groups if mesh.rank in group)
    return FlatDispatch(mesh.group("ep"), [mesh.nodes[rank] for rank in own])


def build_strategy(model: Decoder, mesh: Mesh, spec: RunSpec, fill: Fill) -> Strategy:
    """Build the strategy for a model without memory, which `fill` gives it.

    This is a collective operation. With one worker there is nothing to shard, so all strategies are the same.

    Raises:
        SpecError: a package that the strategy needs is not installed.
    """
    name = spec.cluster.strategy
    if mesh.world == 1 or name == "ddp":
        return Strategy(model, mesh, spec.train, fill)
    if name == "fsdp":
        from mhmoe_ray.distributed.strategies.fsdp import Sharded

        return Sharded(model, mesh, spec.train, fill, spec.cluster.shard_experts)
    from mhmoe_ray.distributed.strategies.zero import Zero

    return Zero(model, mesh, spec.train, fill, stage=int(name.removeprefix("zero")))
