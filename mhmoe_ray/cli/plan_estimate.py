"""The estimates of `mhmoe plan --nodes`: the time of a step on a cluster that does not exist."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from mhmoe_ray.cli.common import in_bytes, in_digits, in_seconds, number_table
from mhmoe_ray.cli.plan_placement import NOBODYS, placed_spec
from mhmoe_ray.planner.estimate import Estimate, estimate, seconds
from mhmoe_ray.planner.memory import memory
from mhmoe_ray.planner.placement import Layout
from mhmoe_ray.planner.traffic import Exchange, Links, dispatches, reductions
from mhmoe_ray.spec import RunSpec

DISPATCHES = ("flat", "hierarchical")
OVER = ("within a node", "between nodes", "between domains")
DAY = 24 * 3600


def as_dict(spec: RunSpec, layout: Layout, found: Estimate) -> dict[str, Any]:
    accelerator, held = spec.cluster.accelerator, memory(spec).total
    return {
        "memory": {"needed": held, "there": accelerator.memory, "fits": held <= accelerator.memory},
        "traffic_per_rank": _traffic_per_rank(spec, layout),
        "step": {
            "parts": [time._asdict() for time in [*found.computing, *found.exchanging]],
            "longest": found.longest._asdict(),
            **_figures(found),
        },
        "dispatches": _dispatched(spec, layout, found) if spec.cluster.ep > 1 else {},
    }


def tables(spec: RunSpec, layout: Layout, found: Estimate) -> Iterator[tuple[str, Table]]:
    if found.exchanging:
        yield "estimated: sent in a step by one rank, on average, over links", _traffic(spec, layout)
    yield "estimated: time of a step by its parts", _parts(found)
    yield "estimated: a step in turn; at best, with exchanges behind computation", _step(spec, found)
    if spec.cluster.ep > 1:
        yield "estimated: rows to experts and back, by cluster.dispatch", _compared(spec, layout, found)


def said_of(spec: RunSpec, found: Estimate) -> list[str]:
    """Return the answers to the first questions of a user, a line each: whether memory suffices, and the time of a
    step."""
    held, accelerator = memory(spec).total, spec.cluster.accelerator
    there = f"{held / 1e9:,.1f} GB needed, {accelerator.memory / 1e9:,.1f} GB on an {accelerator.name}"
    fits = f"memory: fits, {there}" if held <= accelerator.memory else f"memory: does not fit, {there}"
    longest = found.longest
    return [
        f"{fits}; the framework and its buffers come on top",
        f"a step takes {in_seconds(found.overlapped)} to {in_seconds(found.in_turn)}, its longest part is "
        f"{longest.name} ({longest.seconds / found.in_turn:.0%} of the latter), bound by {longest.bound}",
    ]


def estimated(spec: RunSpec, layout: Layout | None) -> Estimate | None:
    """Return the estimate of a step; None for a run on CPUs, whose speed is not known, and if ranks have no place."""
    return estimate(placed_spec(spec, layout), layout) if layout and spec.cluster.gpus_per_worker else None


def cost(spec: RunSpec, found: Estimate) -> str:
    """Return the accelerator hours of the whole run, as a line."""
    gpus = len(found.layout.nodes) * spec.cluster.gpus_per_worker
    best, worst = (gpus * took * spec.train.steps / 3600 for took in (found.overlapped, found.in_turn))
    hours = f"{in_digits(best)} to {in_digits(worst)} hours of an {spec.cluster.accelerator.name}"
    assumed = ", taken to be on one node, as no cluster tells where" if NOBODYS in found.layout.nodes else ""
    return f"about {hours}, on {gpus:,} of them{assumed} (estimated, not checked)"


def _figures(found: Estimate) -> dict[str, float]:
    return {
        "seconds_in_turn": found.in_turn,
        "seconds_overlapped": found.overlapped,
        "tokens_per_s_in_turn": found.tokens / found.in_turn,
        "tokens_per_s_overlapped": found.tokens / found.overlapped,
        "share_of_peak_flops_in_turn": found.flops / found.in_turn,
        "share_of_peak_flops_overlapped": found.flops / found.overlapped,
    }


def _sent(found: list[Exchange]) -> dict[str, float]:
    """Return the bytes that one rank sends in a step, by class of link; empty without exchanges."""
    over = [[e.times * sends.mean for sends in e.links] for e in found]
    return dict(zip(Links._fields, map(sum, zip(*over, strict=True)), strict=True)) if over else {}


def _traffic_per_rank(spec: RunSpec, layout: Layout) -> dict[str, dict[str, float]]:
    rows = {"rows to experts and back": _sent(dispatches(spec, layout))}
    return {**rows, **{e.name: _sent([e]) for e in reductions(spec, layout)}}


def _dispatched(spec: RunSpec, layout: Layout, found: Estimate) -> dict[str, dict[str, Any]]:
    """Return traffic and times of the same run with each kind of dispatch."""
    result = {}
    for name in DISPATCHES:
        own = name == spec.cluster.dispatch
        cluster = spec.cluster.model_copy(update={"dispatch": name})
        other = spec if own else spec.model_copy(update={"cluster": cluster})
        sends, whole = dispatches(other, layout), found if own else estimate(other, layout)
        result[name] = {
            "sent": _sent(sends),
            "seconds": sum(seconds(e, other, layout).seconds for e in sends),
            "seconds_in_turn": whole.in_turn,
            "seconds_overlapped": whole.overlapped,
        }
    return result


def _traffic(spec: RunSpec, layout: Layout) -> Table:
    found = _traffic_per_rank(spec, layout)
    rows = [(name, *(in_bytes(int(b)) for b in sent.values())) for name, sent in found.items() if sent]
    every = [[*sent.values()] for sent in found.values() if sent]
    total = [in_bytes(int(sum(column))) for column in zip(*every, strict=True)]
    return number_table(["", *OVER], [*rows, ("total", *total)])


def _parts(found: Estimate) -> Table:
    every = [*found.computing, *found.exchanging]
    rows = [(t.name, in_seconds(t.seconds), f"{t.seconds / found.in_turn:.1%}", t.bound) for t in every]
    return number_table(["", "time", "share", "bound by"], rows, names=["bound by"])


def _step(spec: RunSpec, found: Estimate) -> Table:
    rows = [
        (
            name,
            in_seconds(took),
            f"{found.tokens / took:,.0f}",
            f"{found.flops / took:.1%}",
            f"{took * spec.train.steps / DAY:,.1f} days",
        )
        for name, took in (("in turn", found.in_turn), ("at best", found.overlapped))
    ]
    return number_table(["", "step", "tokens/s", "of peak FLOP/s", f"{spec.train.steps:,} steps"], rows)


def _compared(spec: RunSpec, layout: Layout, found: Estimate) -> Table:
    rows = []
    for name, told in _dispatched(spec, layout, found).items():
        this = f"{name} (this spec)" if name == spec.cluster.dispatch else name
        times = (told["seconds"], told["seconds_in_turn"], told["seconds_overlapped"])
        rows.append((this, *(in_bytes(int(b)) for b in told["sent"].values()), *map(in_seconds, times)))
    return number_table(["", *OVER, "time", "step in turn", "at best"], rows)
