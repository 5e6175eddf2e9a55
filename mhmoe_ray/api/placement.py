"""Placement of a run's ranks on the nodes of a running or hypothetical cluster, or on one assumed node."""

from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

from mhmoe_ray.api.defaults import OnNote, ignore_note
from mhmoe_ray.cluster.connect import Connection, connect_if_running
from mhmoe_ray.cluster.nodes import free_nodes, total_nodes
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.planner.adapt import Keys
from mhmoe_ray.planner.placement import Layout, Node, build_layout, nodes_on_paper, pack_workers, place_workers
from mhmoe_ray.planner.search import choose_settings
from mhmoe_ray.planner.traffic import has_rails
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.cluster import STREAM_CPUS

ASSUMED_NODE = "one node"
"""Name of the single node that is assumed if no cluster reports its nodes."""


class Placement(NamedTuple):
    """A placement of a run's ranks on the nodes of a cluster."""

    description: str
    """Description of the nodes, which serves as title of the placement."""
    nodes: list[Node]
    rank_nodes: list[Node]
    """Node of each rank; there are fewer entries than ranks if the nodes cannot hold all ranks."""
    layout: Layout | None
    """Nodes and expert-parallel groups of the ranks; None if the nodes cannot hold all ranks."""
    shortage: str | None
    """Text about the workers for which the nodes have no room; None if there is room for all."""
    refusal: str | None
    """Reason why workers would refuse to start on these nodes; None if they would start."""
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the placement as `mhmoe plan --json` and `submit --dry-run` print it."""
        groups = self.layout.groups if self.layout else None
        rank_counts = Counter(self.rank_nodes)
        return {
            "of": self.description,
            "nodes": [{**node._asdict(), "ranks": rank_counts[node]} for node in self.nodes],
            "node_of_rank": [node.name for node in self.rank_nodes],
            "expert_groups": groups.ranks if groups else None,
            "straddling_groups": groups.straddling_indices if groups else None,
            "groups_apart": groups.cross_domain_indices if groups else None,
            "missing": self.shortage,
            "refused": self.refusal,
            "notes": self.notes,
        }


def planned_placement(spec: RunSpec, nodes: int, gpus: int) -> Placement:
    """Return the placement of a run's ranks on a hypothetical cluster of `nodes` equal nodes with `gpus` GPUs each."""
    domain_size = spec.cluster.network.nodes_per_domain
    domain_text = f", {domain_size} to a domain" if domain_size else ", all in one domain"
    planned_nodes = nodes_on_paper(spec.cluster, nodes, gpus)
    description = (
        f"on paper: {_format_nodes(nodes)} of {gpus} GPU{'s' if gpus > 1 else ''}{domain_text if nodes > 1 else ''}"
    )
    return _place_workers(spec, description, planned_nodes)


def forecast_placement(spec: RunSpec, address: str | None = None, on_note: OnNote = ignore_note) -> Placement:
    """Return the placement on the cluster on which the run would start, else on one node that holds all workers."""
    cluster, reason = spec.cluster, "no cluster is running"
    try:
        connection = connect_if_running(address)
        if connection:
            description = f"a forecast for the free nodes of {connection.address}"
            return _place_workers(spec, description, free_nodes(connection, cluster.domain_label), has_stream=True)
    # A forecast starts nothing, so a cluster that does not answer is only worth a warning.
    except ClusterError as e:
        on_note(f"warning: {e}")
        reason = "the cluster did not answer"
    workers = cluster.max_world_size
    assumed_node = Node(ASSUMED_NODE, workers * cluster.cpus_per_worker, workers * cluster.gpus_per_worker)
    return _place_workers(spec, f"if one node holds all workers: {reason}", [assumed_node])


def choose_for_cluster(spec: RunSpec, address: str | None = None) -> tuple[RunSpec, Keys]:
    """Return what `choose_settings` returns for the cluster on which the run would start, if one is running."""
    # A cluster that does not answer is reported by the forecast.
    with suppress(ClusterError):
        if connection := connect_if_running(address):
            return choose_at(spec, connection)
    return choose_settings(spec)


def choose_at(spec: RunSpec, connection: Connection) -> tuple[RunSpec, Keys]:
    """Return what `choose_settings` returns for all nodes of a cluster."""
    needs_nodes = spec.cluster.gpus_per_worker > 0
    return choose_settings(spec, total_nodes(connection, spec.cluster.domain_label) if needs_nodes else ())


def spec_for_layout(spec: RunSpec, layout: Layout) -> RunSpec:
    """Return the spec of a run with as many workers as a layout has ranks."""
    return spec if len(layout.nodes) == spec.cluster.max_world_size else spec.with_workers(len(layout.nodes))


def _place_workers(spec: RunSpec, description: str, nodes: list[Node], has_stream: bool = False) -> Placement:
    """Return the placement of the workers that would start on these nodes; if none would, it names what is missing.
    `has_stream` says that the data stream also needs CPUs of these nodes."""
    cluster, counts = spec.cluster, spec.worker_counts
    cpus, gpus = cluster.cpus_per_worker, cluster.gpus_per_worker
    free_cpus = sum(node.cpus for node in nodes)
    rank_nodes = pack_workers(nodes, cpus, gpus, cluster.max_world_size)
    room = len(rank_nodes)
    if has_stream and cluster.workers.is_elastic:
        # An elastic run leaves one CPU for the data stream, without which no step begins, as train/resilience.py does.
        room = min(room, int((free_cpus - 1) // cpus))
    count = max((n for n in counts if n <= room), default=0)
    if not count:
        resources = f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
        shortage = (
            f"{counts[0] - room:,} of {counts[0]:,} workers find no place: each takes {resources}, and the cluster's "
            f"{_format_nodes(len(nodes))} can hold {room:,} now; Ray starts none before all have a place"
        )
        return Placement(description, nodes, rank_nodes, None, shortage, None, [])
    # An elastic run starts with the largest allowed number of workers that fits, even if there is room for a few more.
    rank_nodes = place_workers(nodes, cluster, count)
    layout = build_layout(rank_nodes, cluster.ep)
    reason = layout.groups.refusal_reason if cluster.straddling == "refuse" else None
    refusal = f"cluster.straddling is refuse, so the run would end at once: {reason}" if reason else None
    notes = [_worker_count_remark(count, cluster.max_world_size), _dispatch_remark(spec, layout)]
    notes.append(_stream_remark(free_cpus - count * cpus) if has_stream else None)
    return Placement(description, nodes, rank_nodes, layout, None, refusal, [remark for remark in notes if remark])


def _worker_count_remark(count: int, max_count: int) -> str | None:
    """Return a remark if a run would start with fewer workers than its spec allows; None otherwise."""
    if count == max_count:
        return None
    return f"it would start with {count:,} of at most {max_count:,} workers, as there is room for now, and grow later"


def _dispatch_remark(spec: RunSpec, layout: Layout) -> str | None:
    """Return a remark if hierarchical dispatch would be flat in some expert-parallel groups of a layout; else None."""
    if spec.cluster.dispatch == "flat":
        return None
    # Hierarchical dispatch needs equally many ranks of a group on each of its nodes, and is flat in other groups.
    groups = [layout.spread(ranks) for ranks in layout.groups.ranks]
    flat_count = sum(group.total() > 1 and not has_rails(group) for group in groups)
    if not flat_count:
        return None
    group_text = f"{flat_count:,} of {len(groups):,} groups" if len(groups) > 1 else "the only group"
    return f"cluster.dispatch is hierarchical, but flat in {group_text}: nodes have unequal numbers of ranks"


def _stream_remark(free_cpus: float) -> str | None:
    """Return a remark if workers leave too few free CPUs for the data stream that feeds them; None otherwise."""
    if free_cpus < 1:
        return "workers take every free CPU, and the data stream has none: no step begins before others give one back"
    if free_cpus < STREAM_CPUS:
        return f"workers leave {free_cpus:g} CPUs for the data stream, which needs {STREAM_CPUS}: they may wait for it"
    return None


def placement_remarks(placement: Placement) -> list[str]:
    """Return the lines about a placement for the user: problems, notes, and groups that span nodes."""
    lines = [line for line in (placement.shortage, placement.refusal) if line] + placement.notes
    layout = placement.layout
    # The message about a refused run describes groups that span nodes already.
    if (
        layout
        and len(layout.node_groups) > 1
        and len(layout.groups.ranks) < len(layout.nodes)
        and not placement.refusal
    ):
        groups, remark = layout.groups, "every group lies on one node"
        if groups.straddling_indices:
            group_text = f"{len(groups.straddling_indices):,} of {len(groups.ranks):,} groups"
            remark = (
                f"{group_text} lie on more than one node, {len(groups.cross_domain_indices) or 'none'} in more than "
                "one domain"
            )
        lines.append(remark)
    return lines


def _format_nodes(count: int) -> str:
    return "one node" if count == 1 else f"{count:,} nodes"
