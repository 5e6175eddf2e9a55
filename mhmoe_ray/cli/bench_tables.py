"""Tables that the commands of `mhmoe bench` print."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mhmoe_ray.cli.formats import format_bytes, format_seconds
from mhmoe_ray.cli.output import note, number_table, out, print_json

if TYPE_CHECKING:
    from mhmoe_ray.bench.acceptance.accounting import Work
    from mhmoe_ray.bench.layers import LayerShape
    from mhmoe_ray.bench.measure import LayerFigures
    from mhmoe_ray.bench.serve.contest import Rates
    from mhmoe_ray.bench.steps import PaperComparison, StepFigures
    from mhmoe_ray.bench.sweep import AxisSweep


Part = str | tuple[str, Table]
"""Piece of a command's output: a text, or a table with its title."""

MIN_WIDTH = 140
"""Smallest width of tables in characters, even on a narrower terminal."""


def print_results(parts: Iterable[Part], json: bool, data: dict[str, Any]) -> None:
    """Print texts and titled tables, separated by empty lines; with `json`, print them to stderr and `data` to stdout.

    Tables have a width of at least `MIN_WIDTH`.
    """
    console = note if json else out
    # Even on a narrow terminal, tables keep this width, so that their lines wrap. Otherwise rich would truncate
    # numbers, which is worse.
    console.width = max(console.width, MIN_WIDTH)
    for i, part in enumerate(parts):
        if i:
            console.print()
        title, *part_tables = [part] if isinstance(part, str) else part
        console.print(title, soft_wrap=True)
        for table in part_tables:
            console.print(table)
    if json:
        print_json(data)


def shape_table(figures: Sequence["LayerFigures"], shape: "LayerShape") -> Table:
    """Return a table of the time and the memory of all expert layers that were measured at one set of sizes.

    The first two layers are the dense one, as wide as k experts, and the plain mixture of experts.
    """
    dense_seconds, plain_seconds = (f.median for f in figures[:2])
    rows = []
    for f in figures:
        sizes = (f.moe.experts, f.moe.top_k, f.moe.d_expert) if f.moe else ("", "", shape.top_k * shape.d_expert)
        ratios = (f"{f.median / dense_seconds:.2f}", f"{f.median / plain_seconds:.2f}")
        saved_bytes = "" if f.saved_bytes is None else format_bytes(f.saved_bytes)
        rows.append(
            (f.name, *map(str, sizes), format_seconds(f.median), *ratios, format_bytes(f.peak_bytes), saved_bytes)
        )
    columns = ("layer", "E", "k", "f", "median", "to dense", "to SMoE", "peak memory", "kept for backward")
    return number_table(columns, rows, names=columns[:1])


def steps_table(figures: Sequence["StepFigures"]) -> Table:
    """Return a table of the time and throughput of whole training steps, with one row for each model."""
    columns = ("model", "E", "k", "f", "parameters", "median", "tokens/s", "time to SMoE", "the paper's")
    rows = []
    for f in figures:
        moe = f.spec.model.moe
        assert moe is not None
        size = (*map(str, (moe.experts, moe.top_k, moe.d_expert)), f"{f.parameters:,}")
        speed = (format_seconds(f.median), f"{f.tokens_per_second:,.0f}")
        rows.append((f.name, *size, *speed, f"{f.ratio_to_smoe:.3f}", f"{f.paper_ratio:.3f}"))
    return number_table(columns, rows, names=columns[:1])


def work_rows(parts: "dict[str, Work]") -> list[tuple[str, ...]]:
    """Return rows of the work of each part of a step, the longest first, and of their sum."""
    total = sum(parts.values(), type(next(iter(parts.values())))())
    ordered_parts = sorted(parts.items(), key=lambda item: -item[1].seconds)
    return [
        (name, f"{w.kernels:,.0f}", f"{w.bytes / 1e9:,.1f}", f"{w.flops / 1e9:,.0f}", f"{w.seconds * 1e3:,.1f}")
        for name, w in [*ordered_parts, ("step", total)]
    ]


def rates_table(figures: "Sequence[Rates]") -> Table:
    """Return a table of the tokens per second of engines or servers, by number of clients, with ratios to earlier
    rows."""
    rows = []
    for f in figures:
        earlier_rates = [rates for rates in figures[: figures.index(f)] if rates.clients == f.clients]
        ratios = ", ".join(f"{f.ratio_to(rates):.2f} of {rates.name}" for rates in earlier_rates)
        first_token = format_seconds(median(f.first_token_seconds)) if f.first_token_seconds else ""
        rows.append((str(f.clients or "random"), f.name, f"{f.rate:,.0f}", first_token, ratios))
    # The sort is stable, so rows with the same number of clients stay in their order.
    rows.sort(key=lambda row: int(row[0]) if row[0].isdigit() else 0)
    return number_table(("clients", "", "tokens/s", "first token", "rate"), rows, names=("clients", ""))


def sweep_tables(sweep: "AxisSweep") -> Iterable[Part]:
    """Yield a table of the time and one of the peak memory of each layer in a sweep, with their titles.

    A column stands for one value of the size that varies. A remark follows if some of the numbers are extrapolated.
    """
    from mhmoe_ray.bench.sweep import AXES

    # If the layers have more work at larger values of the varied size, their time grows with a power of this size, and
    # the last column is the exponent. Otherwise the time should be equal at all values, and the last column shows how
    # much it differs.
    growth_title = f"time ~ {sweep.axis}^" if AXES[sweep.axis].work_grows else "max / min - 1"
    points = [f"{point:,}" for point in sweep.points]
    times, peaks = [], []
    for name, series in sweep.series.items():
        cells = [series.get(point) for point in sweep.points]
        growth_cell = f"{sweep.growth[name]:.2f}" if name in sweep.growth else ""
        times.append((name, *(_mark_extrapolated(f, f and format_seconds(f.median)) for f in cells), growth_cell))
        peaks.append((name, *(_mark_extrapolated(f, f and format_bytes(f.peak_bytes)) for f in cells)))
    yield f"median time over {sweep.axis}", number_table([sweep.axis, *points, growth_title], times, names=[sweep.axis])
    yield f"peak memory over {sweep.axis}", number_table([sweep.axis, *points], peaks, names=[sweep.axis])
    if any(f.is_extrapolated for figures in sweep.points.values() for f in figures):
        yield "~ not measured: extrapolated from fewer rows as a T + b T^2, by which static routing's masks grow"


def paper_table(comparisons: Sequence["PaperComparison"]) -> Part:
    """Return a table, with its title, of our layers beside the throughput of models in the first MH-MoE paper. Each has
    a version with static routing and a dropless one."""
    rows = [
        (c.layer, c.paper, f"{c.tokens_a_second:.2f}", f"{c.papers_ratio:.2f}", f"{c.our_ratio:.2f}")
        for c in comparisons
    ]
    columns = ("layer", "the paper's model", "its tokens/s", "time to its SMoE dynamic", "ours: time to SMoE")
    title = (
        "Comparison with the first paper's own throughput. Its figures are of whole models in training on 8 RTX 3090,\n"
        "and it does not state h. Ours are of one layer: the rest of a model, which evens ratios out, is not in them."
    )
    return title, number_table(columns, rows, names=("layer", "the paper's model"))


def _mark_extrapolated(figures: "LayerFigures | None", text: str | None) -> str:
    if figures is None or text is None:
        return ""
    return f"~{text}" if figures.is_extrapolated else text
