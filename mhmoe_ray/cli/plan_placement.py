"""Placement of a run's ranks: on the nodes of a cluster, or of one on paper; without a cluster to ask, on one node."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from mhmoe_ray.cli.common import note, number_table
from mhmoe_ray.planner.placement import Layout, Node, laid_out, on_paper, packed

if TYPE_CHECKING:
    from mhmoe_ray.spec import RunSpec


NOBODYS = "one node"
"""Name of the single node that is assumed if no cluster reports its nodes."""
SHOWN = 8
"""Largest number of rows of a table."""


class Placement(NamedTuple):
    of: str
    """Description of the nodes that this is a placement on, for a title."""
    nodes: list[Node]
    places: list[Node]
    """Node of each rank; there are fewer entries than ranks if the nodes cannot hold all."""
    layout: Layout | None
    """Layout of the ranks; None if the nodes cannot hold all of them."""
    missing: str | None
    """Line about the ranks that have no place; None if all have one."""
    refused: str | None
    """Line with the reason why workers would refuse to start there; None if they would start."""
    notes: list[str]
    """Further remarks for the user, a line each."""

    def as_dict(self) -> dict[str, Any]:
        groups = self.layout.groups if self.layout else None
        on = Counter(self.places)
        return {
            "of": self.of,
            "nodes": [{**node._asdict(), "ranks": on[node]} for node in self.nodes],
            "node_of_rank": [node.name for node in self.places],
            "expert_groups": groups.ranks if groups else None,
            "straddling_groups": groups.straddling if groups else None,
            "groups_apart": groups.apart if groups else None,
            "missing": self.missing,
            "refused": self.refused,
            "notes": self.notes,
        }


def placement_on_paper(spec: "RunSpec", nodes: int, gpus: int) -> Placement:
    """Return the placement on `nodes` equal nodes on paper, which the spec's workers fill."""
    each = spec.cluster.network.nodes_per_domain
    domains = f", {each} to a domain" if each else ", all in one domain"
    there = on_paper(nodes, gpus * spec.cluster.cpus_per_worker, gpus, each)
    of = f"on paper: {_nodes(nodes)} of {gpus} GPU{'s' if gpus > 1 else ''}{domains if nodes > 1 else ''}"
    return _placement(spec, of, there)


def placement(spec: "RunSpec", address: str | None = None) -> Placement:
    """Return the placement on the cluster that a run would go to.

    A cluster that does not answer is no error, because nothing is about to start: one node that holds all workers is
    then assumed.
    """
    from mhmoe_ray.cluster.connect import connect_if_there
    from mhmoe_ray.cluster.nodes import free_nodes
    from mhmoe_ray.errors import ClusterError

    cluster, why = spec.cluster, "no cluster runs that could be asked"
    try:
        connection = connect_if_there(address)
        if connection:
            of = f"a forecast: as Ray would pack workers on {connection.address} now"
            return _placement(spec, of, free_nodes(connection, cluster.domain_label), shared=True)
    except ClusterError as e:
        note.print(f"warning: {e}", soft_wrap=True)
        why = "the cluster could not be asked"
    workers = cluster.world
    one = Node(NOBODYS, workers * cluster.cpus_per_worker, workers * cluster.gpus_per_worker)
    return _placement(spec, f"if one node holds all workers: {why}", [one])


def placed_spec(spec: "RunSpec", layout: Layout) -> "RunSpec":
    """Return the spec of a run with as many workers as the layout has."""
    return spec if len(layout.nodes) == spec.cluster.world else spec.with_workers(len(layout.nodes))


def _placement(spec: "RunSpec", of: str, nodes: list[Node], shared: bool = False) -> Placement:
    """Return the placement of as many workers as would start on these nodes.

    Args:
        spec: spec of the run.
        of: description of the nodes, for a title.
        nodes: the nodes, with their free CPUs and GPUs.
        shared: whether the data stream needs CPUs of the same nodes.
    """
    cluster, counts = spec.cluster, spec.worker_counts
    cpus, gpus = cluster.cpus_per_worker, cluster.gpus_per_worker
    free = sum(node.cpus for node in nodes)
    places = packed(nodes, cpus, gpus, cluster.world)
    room = len(places)
    if shared and cluster.workers.elastic:
        room = min(room, int((free - 1) // cpus))  # as train/resilience.py: one CPU is for the stream
    count = max((n for n in counts if n <= room), default=0)
    if not count:
        each = f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
        missing = (
            f"{counts[0] - room:,} of {counts[0]:,} workers find no place: each takes {each}, and the cluster's "
            f"{_nodes(len(nodes))} can hold {room:,} now; Ray starts none before all have a place"
        )
        return Placement(of, nodes, places, None, missing, None, [])
    places = places[:count]
    layout = laid_out(places, cluster.ep)
    why = layout.groups.why_refused if cluster.straddling == "refuse" else None
    refused = f"cluster.straddling is refuse, so the run would end at once: {why}" if why else None
    notes = [_fewer(count, cluster.world), _staying_flat(spec, layout)]
    notes.append(_for_stream(free - count * cpus) if shared else None)
    return Placement(of, nodes, places, layout, None, refused, [note for note in notes if note])


def _fewer(count: int, most: int) -> str | None:
    if count == most:
        return None
    return f"it would start with {count:,} of at most {most:,} workers, for which there is room now, and grow later"


def _staying_flat(spec: "RunSpec", layout: Layout) -> str | None:
    from mhmoe_ray.planner.traffic import has_rails

    groups = [layout.spread(ranks) for ranks in layout.groups.ranks]
    flat = sum(group.total() > 1 and not has_rails(group) for group in groups)
    if spec.cluster.dispatch == "flat" or not flat:
        return None
    of_all = f"{flat:,} of {len(groups):,} groups" if len(groups) > 1 else "the only group"
    return f"cluster.dispatch is hierarchical, but flat in {of_all}: nodes have unequally many of the ranks"


def _for_stream(left: float) -> str | None:
    from mhmoe_ray.spec.cluster import STREAM_CPUS

    if left < 1:
        return "workers take every free CPU, and the data stream has none: no step begins before others give one back"
    if left < STREAM_CPUS:
        return f"workers leave {left:g} CPUs for the data stream, which is to have {STREAM_CPUS}: they may wait for it"
    return None


def said_of(placement: Placement) -> list[str]:
    """Return the lines about a placement that a user must know."""
    lines = [line for line in (placement.missing, placement.refused) if line] + placement.notes
    layout = placement.layout
    if layout and len(layout.on_nodes) > 1 and len(layout.groups.ranks) < len(layout.nodes) and not placement.refused:
        groups, said = layout.groups, "every group lies on one node"
        if groups.straddling:
            of_all = f"{len(groups.straddling):,} of {len(groups.ranks):,} groups"
            said = f"{of_all} lie on more than one node, {len(groups.apart) or 'none'} in more than one domain"
        lines.append(said)
    return lines


def _nodes(count: int) -> str:
    return "one node" if count == 1 else f"{count:,} nodes"


def table(placement: Placement) -> Table:
    """Return a table of the first groups, or of the first nodes if a rank is a group of its own.

    If the nodes cannot hold all ranks, it shows how many workers each node takes.
    """
    if placement.layout is None:
        on = Counter(node.name for node in placement.places)
        free = [(node.name, f"{node.cpus:g}", f"{node.gpus:g}", str(on[node.name])) for node in placement.nodes]
        return number_table(["", "free CPUs", "free GPUs", "workers"], _shortened(free))
    layout = placement.layout
    columns: tuple[str, ...] = ("ranks", "node")
    rows: list[tuple[str, ...]] = [_where(ranks, layout) for ranks in layout.on_nodes]
    if len(layout.groups.ranks) < len(layout.nodes):
        columns = ("group", "ranks", "nodes")
        rows = [(str(i), *_where(ranks, layout)) for i, ranks in enumerate(layout.groups.ranks)]
    found = Table(box=None, pad_edge=False)
    for column in columns:
        found.add_column(column, overflow="fold")
    for row in _shortened(rows):
        found.add_row(*row)
    return found


def _where(ranks: list[int], layout: Layout) -> tuple[str, str]:
    """Return the ranks and their nodes, as text."""
    on = Counter(layout.nodes[rank] for rank in ranks)
    names, counts = list(on), set(on.values())
    domains = dict.fromkeys(layout.domains[rank] for rank in ranks)
    if len(on) > 3 and len(counts) == 1:
        where = f"{len(on)} from {names[0]} to {names[-1]}, {counts.pop()} on each"
    elif len(on) > 3:
        where = f"{len(on)} from {names[0]} to {names[-1]}, {min(counts)} to {max(counts)} on each"
    else:
        where = ", ".join(f"{name} ({count})" for name, count in on.items()) if len(on) > 1 else names[0]
    if any(domains):
        where += f"; {', '.join(domains)}" if len(domains) < 4 else f"; {len(domains)} domains"
    return _ranges(ranks), where


def _shortened(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    if len(rows) <= SHOWN:
        return list(rows)
    left = len(rows) - SHOWN + 1
    return [*rows[: SHOWN - 1], (f"and {left:,} more", *("" for _ in rows[0][1:]))]


def _ranges(ranks: list[int]) -> str:
    """Format ranks as ranges, for example "0-3, 8-11"; more than three ranges are abbreviated by "..."."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    said = [f"{a}-{b}" if a < b else str(a) for a, b in runs]
    return ", ".join(said if len(said) < 4 else [*said[:2], "...", said[-1]])
