"""The estimates of `mhmoe plan --nodes`: the time of a training step on a cluster that does not exist."""

from collections.abc import Iterator

from rich.table import Table

from mhmoe_ray.api.placement import ASSUMED_NODE
from mhmoe_ray.api.plan import dispatch_figures, traffic_per_rank
from mhmoe_ray.cli.common import format_bytes, format_digits, format_seconds, number_table
from mhmoe_ray.planner.estimate import Estimate
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.placement import Layout
from mhmoe_ray.planner.remedies import memory_remedies
from mhmoe_ray.spec import RunSpec

LINK_NAMES = ("within a node", "between nodes", "between domains")
DAY_SECONDS = 24 * 3600


def tables(spec: RunSpec, layout: Layout, step: Estimate) -> Iterator[tuple[str, Table]]:
    """Yield the title and the table of each part of the estimate: traffic, times of a training step, and dispatch."""
    if step.exchange_times:
        yield "estimated: sent in a step by one rank, on average, over links", _traffic_table(spec, layout)
    yield "estimated: time of a step by its parts", _parts_table(step)
    yield "estimated: a step in turn; at best, with exchanges behind computation", _step_table(spec, step)
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
    # Without a cluster, all workers are assumed to be on one node. The line must mention this assumption, because the
    # estimate then lacks the cost of exchanges between nodes.
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


def _parts_table(step: Estimate) -> Table:
    parts = [*step.compute_times, *step.exchange_times]
    rows = [
        (part.name, format_seconds(part.seconds), f"{part.seconds / step.sequential_seconds:.1%}", part.bound)
        for part in parts
    ]
    return number_table(["", "time", "share", "bound by"], rows, names=["bound by"])


def _step_table(spec: RunSpec, step: Estimate) -> Table:
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
