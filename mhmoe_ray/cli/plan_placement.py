"""The table of `mhmoe plan` that shows the placement of a run's ranks on nodes."""

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from mhmoe_ray.api.placement import Placement
from mhmoe_ray.cli.common import number_table
from mhmoe_ray.planner.placement import Layout

MAX_ROWS = 8
"""Largest number of rows of the table; if there are more, the last row counts those that are left out."""


def placement_table(placement: Placement) -> Table:
    """Return a table of the first expert-parallel groups and their nodes; of nodes and ranks if each rank is a group.
    If the nodes cannot hold all ranks, it shows each node's free CPUs and GPUs and how many workers fit on it."""
    if placement.layout is None:
        worker_counts = Counter(node.name for node in placement.rank_nodes)
        node_rows = [
            (node.name, f"{node.cpus:g}", f"{node.gpus:g}", str(worker_counts[node.name])) for node in placement.nodes
        ]
        return number_table(["", "free CPUs", "free GPUs", "workers"], _shorten_rows(node_rows))
    layout = placement.layout
    columns: tuple[str, ...] = ("ranks", "node")
    rows: list[tuple[str, ...]] = [_format_location(ranks, layout) for ranks in layout.node_groups]
    if len(layout.groups.ranks) < len(layout.nodes):
        columns = ("group", "ranks", "nodes")
        rows = [(str(i), *_format_location(ranks, layout)) for i, ranks in enumerate(layout.groups.ranks)]
    return number_table(columns, _shorten_rows(rows), names=columns)


def _format_location(ranks: list[int], layout: Layout) -> tuple[str, str]:
    # The names of more than three nodes would make the cell too long, so the first and the last name stand for them.
    rank_counts = Counter(layout.nodes[rank] for rank in ranks)
    node_names, counts = list(rank_counts), set(rank_counts.values())
    domains = dict.fromkeys(layout.domains[rank] for rank in ranks)
    if len(rank_counts) > 3:
        count_text = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{min(counts)}"
        location = f"{len(rank_counts)} from {node_names[0]} to {node_names[-1]}, {count_text} on each"
    elif len(rank_counts) > 1:
        location = ", ".join(f"{name} ({count})" for name, count in rank_counts.items())
    else:
        location = node_names[0]
    if any(domains):
        location += f"; {', '.join(domains)}" if len(domains) < 4 else f"; {len(domains)} domains"
    return _format_ranges(ranks), location


def _shorten_rows(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    if len(rows) <= MAX_ROWS:
        return list(rows)
    # The line that counts the hidden rows takes the place of a row, so one more row is hidden.
    hidden_count = len(rows) - MAX_ROWS + 1
    return [*rows[: MAX_ROWS - 1], (f"and {hidden_count:,} more", *("" for _ in rows[0][1:]))]


def _format_ranges(ranks: list[int]) -> str:
    """Format ranks as ranges, for example "0-3, 8-11"; more than three ranges are abbreviated by "..."."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    texts = [f"{a}-{b}" if a < b else str(a) for a, b in ranges]
    return ", ".join(texts if len(texts) < 4 else [*texts[:2], "...", texts[-1]])
