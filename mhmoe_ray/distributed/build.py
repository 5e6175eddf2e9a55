"""Build a rank's dispatch and strategy from `cluster.dispatch` and `cluster.strategy` of the spec."""

from mhmoe_ray.distributed.dispatch.flat import FlatDispatch
from mhmoe_ray.distributed.dispatch.hierarchical import HierarchicalDispatch
from mhmoe_ray.distributed.mesh import Mesh, create_process_group
from mhmoe_ray.distributed.strategies.ddp import FillModel, Strategy
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.planner.placement import ranks_by_node
from mhmoe_ray.spec import ClusterSpec, RunSpec


def build_dispatch(spec: ClusterSpec, mesh: Mesh) -> FlatDispatch | HierarchicalDispatch | None:
    """Return the dispatch of this rank, or None if ep is 1, in a collective operation. A group on one node, or with
    unequal numbers of ranks on its nodes (`Mesh.uneven_count`), always has a flat one."""
    # A group of ranks whose nodes do not allow a hierarchical dispatch gets a flat one. Both have the same results, so
    # an uneven placement after a restart need not end the run.
    if mesh.ep == 1:
        return None
    if spec.dispatch == "hierarchical":
        # All ranks must create the process groups of all expert-parallel groups in the same order, so `grids` covers
        # every group and not only that of this rank.
        grids = [grid for group in mesh.groups if (grid := ranks_by_node(group, mesh.nodes)) and len(grid) > 1]
        if grids:
            node = create_process_group([ranks for grid in grids for ranks in grid])
            rail = create_process_group([list(ranks) for grid in grids for ranks in zip(*grid, strict=True)])
            if node is not None and rail is not None:
                return HierarchicalDispatch(node, rail)
    our_group = next(group for group in mesh.groups if mesh.rank in group)
    return FlatDispatch(mesh.group("ep"), [mesh.nodes[rank] for rank in our_group])


def build_strategy(model: Trunk, mesh: Mesh, spec: RunSpec, fill: FillModel) -> Strategy:
    """Build a run's strategy, with the weights of a model on the meta device, in a collective operation. Without a
    process group, it is a plain `Strategy`. A missing package is a SpecError."""
    name = spec.cluster.strategy
    if mesh.devices is None or name == "ddp":
        return Strategy(model, mesh, spec, fill)
    if name == "fsdp":
        from mhmoe_ray.distributed.strategies.fsdp import FsdpStrategy

        return FsdpStrategy(model, mesh, spec, fill)
    from mhmoe_ray.distributed.strategies.zero import ZeroStrategy

    return ZeroStrategy(model, mesh, spec, fill, stage=int(name.removeprefix("zero")))
