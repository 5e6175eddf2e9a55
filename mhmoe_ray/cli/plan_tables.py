"""The tables of `mhmoe plan`, each with its title: sizes, memory, traffic, placement and estimated times of a step."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.table import Table

from mhmoe_ray.api.placement import ASSUMED_NODE, Placement, spec_for_layout
from mhmoe_ray.api.plan import dispatch_figures, traffic_per_rank
from mhmoe_ray.cli.formats import format_bytes, format_digits, format_seconds
from mhmoe_ray.cli.output import number_table
from mhmoe_ray.planner.estimate import Estimate
from mhmoe_ray.planner.expert_step import expert_step
from mhmoe_ray.planner.family import plan_of
from mhmoe_ray.planner.match import compare_models
from mhmoe_ray.planner.memory import checkpoint_copy_bytes, compute_memory
from mhmoe_ray.planner.placement import Layout
from mhmoe_ray.planner.remedies import memory_remedies
from mhmoe_ray.planner.sizes import model_parts
from mhmoe_ray.planner.traffic import Exchange, all_exchanges
from mhmoe_ray.spec import ModelSpec, RunSpec

MAX_ROWS = 8
"""Largest number of rows of the table; if there are more, the last row counts those that are left out."""
LINK_NAMES = ("within a node", "between nodes", "between domains")
DAY_SECONDS = 24 * 3600


def tables(spec: RunSpec, placement: Placement) -> Iterator[tuple[str, Table]]:
    """Yield the title and the table of each part of a plan: sizes, memory, traffic and placement of ranks."""
    yield "parameters and multiply-adds per token, in one layer", _parts_table(spec)
    if spec.reference and (reference := spec.reference_model):
        name = spec.reference.name
        yield f"beside {name} on the same trunk", _parity_table(spec.model, name, reference)
    batch = plan_of(spec.model).micro_batch(spec)
    yield f"memory of a rank, micro-batches of {batch}", _memory_table(spec)
    if step := expert_step(spec):
        title = f"expert step of one layer on one rank, {batch}, forward, {spec.train.precision}"
        row = (f"{step.rows:,}", f"{step.flops:.3g}", format_bytes(step.bytes), f"{step.intensity:.1f}")
        yield title, number_table(["rows", "FLOPs", "moved", "FLOPs per byte"], [row])
    # An elastic run may start with fewer workers than the spec's largest number, and then exchange other amounts.
    step_exchanges = all_exchanges(
        spec_for_layout(spec, placement.layout) if placement.layout else spec, placement.layout
    )
    if step_exchanges:
        yield "exchanged in a step, by one rank", _exchange_table(step_exchanges)
    yield f"placement, {placement.description}", _placement_table(placement)


def _parts_table(spec: RunSpec) -> Table:
    rows = [
        (p.name, str(p.layers), f"{p.parameters:,}", f"{p.active:,}", f"{p.macs:,}", f"{p.layers * p.parameters:,}")
        for p in model_parts(spec.model)
    ]
    return number_table(["", "layers", "parameters", "active", "multiply-adds", "in all layers"], rows)


def _parity_table(model: ModelSpec, name: str, reference: ModelSpec) -> Table:
    comparisons = compare_models(model, reference).items()
    rows = [(quantity, f"{c.model_value:,}", f"{c.reference:,}", f"{c.ratio:.3f}") for quantity, c in comparisons]
    return number_table(["", "this", name, "ratio"], rows)


def _exchange_table(step_exchanges: list[Exchange]) -> Table:
    rows = [
        (
            e.name,
            str(e.ranks),
            format_bytes(e.payload),
            format_bytes(e.sent_bytes),
            f"{e.times:,}",
            format_bytes(e.sent_per_step),
        )
        for e in step_exchanges
    ]
    return number_table(["", "ranks", "brings", "sends", "times", "sends in all"], rows)


def _memory_table(spec: RunSpec) -> Table:
    """Return a table of the memory of a rank, with the largest and the smallest number of workers."""
    # Ranks of an elastic run need the most memory with the fewest workers, whose shards are largest.
    counts = [*dict.fromkeys([spec.worker_counts[-1], spec.worker_counts[0]])]
    specs = [spec.with_workers(count) for count in counts]
    memories = [compute_memory(sized_spec) for sized_spec in specs]
    by_name = zip(memories[0]._fields, zip(*memories, strict=True), strict=True)
    # Rows that are zero for every number of workers are left out, because they would only distract.
    rows = [(name.replace("_", " "), *map(format_bytes, sizes)) for name, sizes in by_name if any(sizes)]
    rows.append(("total", *(format_bytes(h.total) for h in memories)))
    if spec.cluster.gpus_per_worker:
        rows.append(
            ("checkpoint copy, on the host", *(format_bytes(checkpoint_copy_bytes(sized_spec)) for sized_spec in specs))
        )
    columns = [f"of {count} workers" for count in counts]
    return number_table(["", *columns], rows, header=len(counts) > 1)


def _placement_table(placement: Placement) -> Table:
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


def estimate_tables(spec: RunSpec, layout: Layout, step: Estimate) -> Iterator[tuple[str, Table]]:
    """Yield the title and the table of each part of the estimate: traffic, times of a training step, and dispatch."""
    if step.exchange_times:
        yield "estimated: sent in a step by one rank, on average, over links", _traffic_table(spec, layout)
    yield "estimated: time of a step by its parts", _times_table(step)
    yield "estimated: a step in turn; at best, with exchanges behind computation", _totals_table(spec, step)
    if spec.cluster.ep > 1:
        yield "estimated: rows to experts and back, by cluster.dispatch", _dispatch_table(spec, layout, step)


def summary_lines(spec: RunSpec, step: Estimate) -> list[str]:
    """Return lines that summarize an estimate: whether a rank's memory suffices, and the time of a training step."""
    rank_memory, accelerator = compute_memory(spec).total, spec.cluster.accelerator
    comparison = f"{rank_memory / 1e9:,.1f} GB needed, {accelerator.memory / 1e9:,.1f} GB on an {accelerator.name}"
    fits = rank_memory <= accelerator.memory
    lines = [f"memory: {'fits' if fits else 'does not fit'}, {comparison}; the framework and its buffers come on top"]
    if not fits and (remedies := memory_remedies(spec)):
        savings = "; ".join(f"{remedy} saves {format_bytes(remedy.saved_bytes)}" for remedy in remedies)
        lines.append(f"each by itself, {savings}")
    longest_part = step.longest_part
    return [
        *lines,
        f"a step takes {format_seconds(step.overlapped_seconds)} to {format_seconds(step.sequential_seconds)}, "
        f"its longest part is {longest_part.name} "
        f"({longest_part.seconds / step.sequential_seconds:.0%} of the latter), bound by {longest_part.bound}: "
        f"{longest_part.remedy}",
    ]


def format_cost(spec: RunSpec, step: Estimate) -> str:
    """Return a line about the estimated accelerator hours of a whole run."""
    gpus = len(step.layout.nodes) * spec.cluster.gpus_per_worker
    best, worst = (
        gpus * step_seconds * spec.train.steps / 3600
        for step_seconds in (step.overlapped_seconds, step.sequential_seconds)
    )
    hours = f"{format_digits(best)} to {format_digits(worst)} hours of an {spec.cluster.accelerator.name}"
    # All workers are assumed to be on one node, so the estimate lacks the cost of exchanges between nodes.
    assumption = ", taken to be on one node, as no cluster tells where" if ASSUMED_NODE in step.layout.nodes else ""
    return f"about {hours}, on {gpus:,} of them{assumption} (estimated, not checked)"


def _traffic_table(spec: RunSpec, layout: Layout) -> Table:
    traffic = traffic_per_rank(spec, layout)
    rows = [
        (name, *(format_bytes(int(b)) for b in byte_counts.values()))
        for name, byte_counts in traffic.items()
        if byte_counts
    ]
    byte_rows = [[*byte_counts.values()] for byte_counts in traffic.values() if byte_counts]
    total = [format_bytes(int(sum(column))) for column in zip(*byte_rows, strict=True)]
    return number_table(["", *LINK_NAMES], [*rows, ("total", *total)])


def _times_table(step: Estimate) -> Table:
    parts = [*step.compute_times, *step.exchange_times]
    rows = [
        (part.name, format_seconds(part.seconds), f"{part.seconds / step.sequential_seconds:.1%}", part.bound)
        for part in parts
    ]
    return number_table(["", "time", "share", "bound by"], rows, names=["bound by"])


def _totals_table(spec: RunSpec, step: Estimate) -> Table:
    rows = [
        (
            name,
            format_seconds(step_seconds),
            f"{step.tokens / step_seconds:,.0f}",
            f"{step.peak_seconds / step_seconds:.1%}",
            f"{step_seconds * spec.train.steps / DAY_SECONDS:,.1f} days",
        )
        for name, step_seconds in (("in turn", step.sequential_seconds), ("at best", step.overlapped_seconds))
    ]
    return number_table(["", "step", "tokens/s", "of peak FLOP/s", f"{spec.train.steps:,} steps"], rows)


def _dispatch_table(spec: RunSpec, layout: Layout, step: Estimate) -> Table:
    rows = []
    for name, figures in dispatch_figures(spec, layout, step).items():
        label = f"{name} (this spec)" if name == spec.cluster.dispatch else name
        times = (figures["seconds"], figures["seconds_in_turn"], figures["seconds_overlapped"])
        rows.append((label, *(format_bytes(int(b)) for b in figures["sent"].values()), *map(format_seconds, times)))
    return number_table(["", *LINK_NAMES, "time", "step in turn", "at best"], rows)
