"""The tables of `mhmoe bench`."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mhmoe_ray.cli.common import in_bytes, in_seconds, number_table

if TYPE_CHECKING:
    from mhmoe_ray.bench import checkpoints as checkpoints_
    from mhmoe_ray.bench import steps as steps_
    from mhmoe_ray.bench.layers import Absent
    from mhmoe_ray.bench.measure import Figures
    from mhmoe_ray.bench.serve.contest import Rates
    from mhmoe_ray.bench.sweep import Sweep


Part = str | tuple[str, Table]
"""A text, or a table with its title."""

WIDTH = 140
"""Smallest width of tables in characters, also on narrower terminals: a truncated number is worse than a long line."""


def show(console: Console, parts: Iterable[Part]) -> None:
    """Print the parts, separated by empty lines."""
    console.width = max(console.width, WIDTH)
    for i, one in enumerate(parts):
        if i:
            console.print()
        if isinstance(one, str):
            console.print(one, soft_wrap=True)
            continue
        title, table = one
        console.print(title, soft_wrap=True)
        console.print(table)


def one_shape(figures: Sequence["Figures"], top_k: int, d_expert: int) -> Table:
    """Return a table of all layers at one shape; `top_k` and `d_expert` are the plain layer's and give the dense one's
    width."""
    dense, plain = (f.median for f in figures[:2])
    rows = []
    for f in figures:
        sizes = (f.moe.experts, f.moe.top_k, f.moe.d_expert) if f.moe else ("", "", top_k * d_expert)
        ratios = (f"{f.median / dense:.2f}", f"{f.median / plain:.2f}")
        kept = "" if f.kept is None else in_bytes(f.kept)
        rows.append((f.name, *map(str, sizes), in_seconds(f.median), *ratios, in_bytes(f.peak), kept))
    columns = ("layer", "E", "k", "f", "median", "to dense", "to SMoE", "peak memory", "kept for backward")
    return number_table(columns, rows, names=columns[:1])


def steps(figures: Sequence["steps_.StepFigures"]) -> Table:
    """Return a table of whole training steps."""
    columns = ("model", "E", "k", "f", "parameters", "median", "tokens/s", "time to SMoE", "the paper's")
    rows = []
    for f in figures:
        moe = f.spec.model.moe
        assert moe is not None
        size = (*map(str, (moe.experts, moe.top_k, moe.d_expert)), f"{f.parameters:,}")
        speed = (in_seconds(f.median), f"{f.tokens_a_second:,.0f}")
        rows.append((f.name, *size, *speed, f"{f.to_smoe:.3f}", f"{f.paper:.3f}"))
    return number_table(columns, rows, names=columns[:1])


def answers(figures: "Sequence[Rates]") -> Table:
    """Return a table of the rates for each number of clients, with ratios to the rates of the contestants before."""
    rows = []
    for f in figures:
        before = [other for other in figures[: figures.index(f)] if other.clients == f.clients]
        ratios = ", ".join(f"{f.to(other):.2f} of {other.name}" for other in before)
        first = in_seconds(median(f.first)) if f.first else ""
        rows.append((str(f.clients or "random"), f.name, f"{f.rate:,.0f}", first, ratios))
    rows.sort(key=lambda row: int(row[0]) if row[0].isdigit() else 0)
    return number_table(("clients", "", "tokens/s", "first token", "rate"), rows, names=("clients", ""))


def checkpoints(figures: "checkpoints_.Figures") -> Table:
    """Return a table of saving a checkpoint, compared with torch.save of the same state."""
    whole = median(figures.torch_save)
    named = {
        "torch.save, training waits": figures.torch_save,
        "checkpoint: training waits": figures.pauses,
        "checkpoint: until it counts": figures.committed,
        "a training step": figures.steps,
        "a training step beside it": figures.beside,
    }
    rows = [(name, in_seconds(median(found)), f"{median(found) / whole:.3f}") for name, found in named.items()]
    if figures.extra is not None and figures.extra_to_state is not None:
        rows.append(("memory, of the state's", in_bytes(figures.extra), f"{figures.extra_to_state:.3f}"))
    return number_table(("", "median", "to torch.save"), rows)


def swept(sweep: "Sweep") -> Iterable[Part]:
    """Yield tables of the time and the peak memory of each layer along the axis."""
    from mhmoe_ray.bench.sweep import AXES

    growth = f"time ~ {sweep.over}^" if AXES[sweep.over].grows else "max / min - 1"
    points = [f"{at:,}" for at in sweep.points]
    times, peaks = [], []
    for name, along in sweep.series.items():
        cells = [along.get(at) for at in sweep.points]
        grown = f"{sweep.growth[name]:.2f}" if name in sweep.growth else ""
        times.append((name, *(_mark(f, f and in_seconds(f.median)) for f in cells), grown))
        peaks.append((name, *(_mark(f, f and in_bytes(f.peak)) for f in cells)))
    yield f"median time over {sweep.over}", number_table([sweep.over, *points, growth], times, names=[sweep.over])
    yield f"peak memory over {sweep.over}", number_table([sweep.over, *points], peaks, names=[sweep.over])
    if any(f.extrapolated for figures in sweep.points.values() for f in figures):
        yield "~ not measured: drawn on from fewer rows by the law of static routing's masks, a T + b T^2"


def paper(figures: Sequence["Figures"]) -> Part:
    """Return a table of static and dropless routing beside the first paper's throughput, with its title."""
    from mhmoe_ray.bench.steps import beside

    rows = [
        (b.layer, b.paper, f"{b.tokens_a_second:.2f}", f"{b.papers_ratio:.2f}", f"{b.our_ratio:.2f}")
        for b in beside(figures)
    ]
    columns = ("layer", "the paper's model", "its tokens/s", "time to its SMoE dynamic", "ours: time to SMoE")
    title = (
        "Beside the first paper's own throughput. Its figures are of whole models in training on 8 RTX 3090, its h is\n"
        "not stated; ours are of one layer here, so that all beside the layer, which evens ratios out, is not in them."
    )
    return title, number_table(columns, rows, names=("layer", "the paper's model"))


def not_measured(absent: Sequence["Absent"]) -> Iterable[str]:
    if absent:
        yield "\n".join(f"not measured: {a.name}: {a.why}" for a in absent)


def _mark(figures: "Figures | None", text: str | None) -> str:
    if figures is None or text is None:
        return ""
    return f"~{text}" if figures.extrapolated else text
