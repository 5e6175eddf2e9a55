"""Whether a run's workers fit on a site's nodes, by the same packing as the planner's."""

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.placement import Node, packed
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.cluster import STREAM_CPUS
from mhmoe_ray.spec.site import SiteSpec


def nodes_for(site: SiteSpec, run: RunSpec) -> int:
    """Worker nodes that the run takes at most.

    Raises:
        SpecError: one of its workers is larger than a node, or the nodes are too few; or no node has CPUs left for the
            data stream.
    """
    each, cluster = site.workers, run.cluster
    wanted, cpus, gpus = cluster.workers.max, cluster.cpus_per_worker, cluster.gpus_per_worker
    nodes = [Node(f"worker {i}", each.cpus, each.gpus) for i in range(each.max)]
    places = packed(nodes, cpus, gpus, wanted)
    if len(places) < wanted:
        why = (
            f"{wanted} workers of {cpus} CPU and {gpus} GPU each do not fit on {each.max} nodes of {each.cpus} CPUs "
            f"and {each.gpus} GPUs, which hold {len(places)}"
        )
        raise SpecError(f"run {run.name}", why, "raise workers.max of the site, or lower cluster.workers of the run")
    used = len(set(places))
    spare = used * each.cpus - wanted * cpus + site.data.max * site.data.cpus
    if spare < STREAM_CPUS:
        why = f"its workers leave {spare} CPUs for the data stream, which needs {STREAM_CPUS}"
        raise SpecError(f"run {run.name}", why, "raise data.max of the site")
    return used
