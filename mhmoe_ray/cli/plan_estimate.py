"""The estimates of `mhmoe plan --nodes`: the time of a training step on a cluster that does not exist."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from mhmoe_ray.cli.common import format_bytes, format_digits, format_seconds, number_table
from mhmoe_ray.cli.plan_placement import ASSUMED_NODE, spec_for_layout
from mhmoe_ray.planner.estimate import Estimate, estimate_step_time, exchange_time
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.placement import Layout
from mhmoe_ray.planner.traffic import Exchange, LinkLoads, dispatch_exchanges, reduction_exchanges
from mhmoe_ray.spec import RunSpec

DISPATCHES = ("flat", "hierarchical")
LINK_NAMES = ("within a node", "between nodes", "between domains")
DAY_SECONDS = 24 * 3600


def as_dict(spec: RunSpec, layout: Layout, step: Estimate) -> dict[str, Any]:
    """Return the estimate of a step, with its memory and traffic, as `mhmoe plan --json` prints it."""
    accelerator, rank_memory = spec.cluster.accelerator, compute_memory(spec).total
    # Scripts read these keys, so the keys must not change when a field of an estimate is renamed.
    return {
        "memory": {"needed": rank_memory, "there": accelerator.memory, "fits": rank_memory <= accelerator.memory},
        "traffic_per_rank": _traffic_per_rank(spec, layout),
        "step": {
            "parts": [time._asdict() for time in [*step.compute_times, *step.exchange_times]],
            "longest": step.longest_part._asdict(),
            **_figures(step),
        },
        "dispatches": _dispatch_figures(spec, layout, step) if spec.cluster.ep > 1 else {},
    }


def tables(spec: RunSpec, layout: Layout, step: Estimate) -> Iterator[tuple[str, Table]]:
    """Yield the tables of an estimate, each after its title."""
    if step.exchange_times:
        yield "estimated: sent in a step by one rank, on average, over links", _traffic_table(spec, layout)
    yield "estimated: time of a step by its parts", _parts_table(step)
    yield "estimated: a step in turn; at best, with exchanges behind computation", _step_table(spec, step)
    if spec.cluster.ep > 1:
        yield "estimated: rows to experts and back, by cluster.dispatch", _dispatch_table(spec, layout, step)


def summary_lines(spec: RunSpec, step: Estimate) -> list[str]:
    """Return the summary of an estimate, a line each: whether a rank's memory suffices, and the time of a step."""
    rank_memory, accelerator = compute_memory(spec).total, spec.cluster.accelerator
    comparison = f"{rank_memory / 1e9:,.1f} GB needed, {accelerator.memory / 1e9:,.1f} GB on an {accelerator.name}"
    fits = f"memory: fits, {comparison}" if rank_memory <= accelerator.memory else f"memory: does not fit, {comparison}"
    longest_part = step.longest_part
    return [
        f"{fits}; the framework and its buffers come on top",
        f"a step takes {format_seconds(step.overlapped_seconds)} to {format_seconds(step.sequential_seconds)}, "
        f"its longest part is {longest_part.name} "
        f"({longest_part.seconds / step.sequential_seconds:.0%} of the latter), bound by {longest_part.bound}",
    ]


def estimate_step(spec: RunSpec, layout: Layout | None) -> Estimate | None:
    """Estimate a training step; return None for a run on CPUs, or if the nodes cannot hold the ranks."""
    # A spec describes the speed of its accelerator but not that of its CPUs, so there is no estimate for a run on CPUs.
    return (
        estimate_step_time(spec_for_layout(spec, layout), layout) if layout and spec.cluster.gpus_per_worker else None
    )


def format_cost(spec: RunSpec, step: Estimate) -> str:
    """Return a line about the estimated accelerator hours of a whole run."""
    gpus = len(step.layout.nodes) * spec.cluster.gpus_per_worker
    best, worst = (
        gpus * step_seconds * spec.train.steps / 3600
        for step_seconds in (step.overlapped_seconds, step.sequential_seconds)
    )
    hours = f"{format_digits(best)} to {format_digits(worst)} hours of an {spec.cluster.accelerator.name}"
    # The line must mention the assumption of a single node, because it leaves out the cost of exchanges between nodes.
    assumption = ", taken to be on one node, as no cluster tells where" if ASSUMED_NODE in step.layout.nodes else ""
    return f"about {hours}, on {gpus:,} of them{assumption} (estimated, not checked)"


def _figures(step: Estimate) -> dict[str, float]:
    """Return times and rates of a step: with its parts in turn, and with exchanges behind computation."""
    return {
        "seconds_in_turn": step.sequential_seconds,
        "seconds_overlapped": step.overlapped_seconds,
        "tokens_per_s_in_turn": step.tokens / step.sequential_seconds,
        "tokens_per_s_overlapped": step.tokens / step.overlapped_seconds,
        "share_of_peak_flops_in_turn": step.peak_seconds / step.sequential_seconds,
        "share_of_peak_flops_overlapped": step.peak_seconds / step.overlapped_seconds,
    }


def _bytes_by_link(exchanges: list[Exchange]) -> dict[str, float]:
    """Return the mean number of bytes that a rank sends in a step, by class of link; empty without exchanges."""
    link_bytes = [[e.times * sends.mean for sends in e.links] for e in exchanges]
    return dict(zip(LinkLoads._fields, map(sum, zip(*link_bytes, strict=True)), strict=True)) if link_bytes else {}


def _traffic_per_rank(spec: RunSpec, layout: Layout) -> dict[str, dict[str, float]]:
    rows = {"rows to experts and back": _bytes_by_link(dispatch_exchanges(spec, layout))}
    return {**rows, **{e.name: _bytes_by_link([e]) for e in reduction_exchanges(spec, layout)}}


def _dispatch_figures(spec: RunSpec, layout: Layout, step: Estimate) -> dict[str, dict[str, Any]]:
    """Return the traffic and times of the same run for each kind of dispatch, flat and hierarchical."""
    figures = {}
    for name in DISPATCHES:
        # `step` is the estimate for the spec's own dispatch, so only the other dispatch needs a new estimate.
        is_current = name == spec.cluster.dispatch
        cluster = spec.cluster.model_copy(update={"dispatch": name})
        variant = spec if is_current else spec.model_copy(update={"cluster": cluster})
        exchanges, variant_step = (
            dispatch_exchanges(variant, layout),
            step if is_current else estimate_step_time(variant, layout),
        )
        figures[name] = {
            "sent": _bytes_by_link(exchanges),
            "seconds": sum(exchange_time(e, variant, layout).seconds for e in exchanges),
            "seconds_in_turn": variant_step.sequential_seconds,
            "seconds_overlapped": variant_step.overlapped_seconds,
        }
    return figures


def _traffic_table(spec: RunSpec, layout: Layout) -> Table:
    traffic = _traffic_per_rank(spec, layout)
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
    for name, figures in _dispatch_figures(spec, layout, step).items():
        label = f"{name} (this spec)" if name == spec.cluster.dispatch else name
        times = (figures["seconds"], figures["seconds_in_turn"], figures["seconds_overlapped"])
        rows.append((label, *(format_bytes(int(b)) for b in figures["sent"].values()), *map(format_seconds, times)))
    return number_table(["", *LINK_NAMES, "time", "step in turn", "at best"], rows)
