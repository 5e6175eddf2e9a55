"""Plot of a sweep: time, its ratio to the dense layer, and peak memory of each layer at several values of one size."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mhmoe_ray.bench.layers import has_masks
from mhmoe_ray.bench.measure import LayerFigures, LayerRequest
from mhmoe_ray.bench.sweep import AXES, AxisSweep
from mhmoe_ray.bench.timing import Hardware
from mhmoe_ray.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, save, short, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = {"dense": BLACK, "SMoE": BLUE, "X-MoE": SKY, "fine-grained": GREEN, "transformers": PURPLE, "DeepSpeed": GREY}
HEAD_COLOURS = (VERMILION, ORANGE)
"""Colours of multi-head layers in their order. With more layers the colours repeat, but their marks differ."""
MARKS = "osD^vPX<>*pd"


class Style(NamedTuple):
    """Colour and marks of a layer's line; marks are hollow for static routing and for other packages."""

    colour: str
    mark: str
    is_hollow: bool


def plot(sweep: AxisSweep, request: LayerRequest, hardware: Hardware, path: Path) -> None:
    """Draw the measurements of a sweep, and write the plot as a PNG file.

    A lack of matplotlib, or a file that cannot be written, is a DataError.
    """
    with style():
        save(draw_plot(sweep, request, hardware), path)


def draw_plot(sweep: AxisSweep, request: LayerRequest, hardware: Hardware) -> "Figure":
    """Return a figure with panels of the time, its ratio to the dense layer and peak memory, and a legend."""
    figure = new_figure(13, 4.6)
    time, ratio, memory = figure.subplots(1, 3)
    dense = {point: figures[0].median for point, figures in sweep.points.items()}
    styles = layer_styles(sweep.series)
    for name, layer_figures in sweep.series.items():
        _draw_layer(time, layer_figures, {point: f.median for point, f in layer_figures.items()}, styles[name], name)
        _draw_layer(
            ratio, layer_figures, {point: f.median / dense[point] for point, f in layer_figures.items()}, styles[name]
        )
        _draw_layer(
            memory, layer_figures, {point: f.peak_bytes / 1e9 for point, f in layer_figures.items()}, styles[name]
        )
    dropless = [
        f.median / dense[point]
        for point, point_figures in sweep.points.items()
        for f in point_figures
        if not has_masks(f.moe)
    ]
    # The limits do not include static routing, because its ratios are so large that all other lines would look flat.
    ratio.set_ylim(min(dropless) / 1.15, max(dropless) * 1.15)
    for axes, title in ((time, "time (s)"), (ratio, "time, ratio to dense"), (memory, "peak memory (GB)")):
        _format_axes(axes, sweep, title)
    if AXES[sweep.axis].work_grows:
        _draw_guide(time, dense)
    figure.legend(loc="outside right center", handlelength=2.4, labelspacing=0.7)
    figure.suptitle(_title(sweep, request, hardware), x=0.01, ha="left", fontsize="medium")
    return figure


def layer_styles(series: dict[str, dict[int, LayerFigures]]) -> dict[str, Style]:
    """Return the style of each layer of a sweep by the layer's name.

    A layer has the same colour with static routing and with any kernel. The marks change from layer to layer.
    """
    colour_by_layer: dict[str, str] = {}
    styles = {}
    for i, (name, layer_figures) in enumerate(series.items()):
        base = name.partition(",")[0].removesuffix(" static")
        if base.startswith("MH-MoE"):
            colour = colour_by_layer.setdefault(base, HEAD_COLOURS[len(colour_by_layer) % len(HEAD_COLOURS)])
        else:
            colour = COLOURS[base if base in COLOURS else base.partition(" ")[0]]
        is_hollow = name.endswith(" static") or next(iter(layer_figures.values())).package is not None
        styles[name] = Style(colour, MARKS[i % len(MARKS)], is_hollow)
    return styles


def _draw_layer(
    axes: "Axes", layer_figures: dict[int, LayerFigures], values: dict[int, float], style: Style, label: str = ""
) -> None:
    """Draw the values of a layer by point as a line, whose extrapolated part is dashed; `label` may be empty."""
    measured_points = [point for point in layer_figures if not layer_figures[point].is_extrapolated]
    extrapolated_points = [point for point in layer_figures if layer_figures[point].is_extrapolated]
    line_options: dict[str, Any] = {
        "color": style.colour,
        "marker": style.mark,
        "markersize": 5.5,
        "linewidth": 1.1 if style.is_hollow else 1.6,
        "markerfacecolor": "white" if style.is_hollow else style.colour,
    }
    # matplotlib leaves a label that starts with an underscore out of the legend, so "_" stands for no entry.
    axes.plot(measured_points, [values[point] for point in measured_points], label=label or "_", **line_options)
    if extrapolated_points:
        # The dashed line starts at the last measured point, so that there is no gap.
        dashed_points = [*measured_points[-1:], *extrapolated_points]
        axes.plot(
            dashed_points, [values[point] for point in dashed_points], linestyle=(0, (4, 2)), zorder=1.9, **line_options
        )


def _format_axes(axes: "Axes", sweep: AxisSweep, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_title(title, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(sweep.points), labels := [short(point) for point in sweep.points])
    axes.set_xlabel(AXES[sweep.axis].label + (" (1K = 1,024)" if "K" in "".join(labels) else ""))
    # A short axis needs ticks between the powers of ten. On a long axis such ticks would overlap.
    low, high = axes.get_ylim()
    within_decades = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high / low < 5 else (1, 2, 5)
    # LogLocator leaves ticks out if there are more than `numticks`, so this number is large.
    axes.yaxis.set_major_locator(LogLocator(subs=within_decades if high / low < 200 else (1,), numticks=99))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(True, linewidth=0.5, alpha=0.35)


def _draw_guide(axes: "Axes", dense: dict[int, float]) -> None:
    """Draw a dotted line of slope 1 (time proportional to size) through half the dense layer's first time."""
    first_point, last_point = min(dense), max(dense)
    guide = {first_point: dense[first_point] / 2, last_point: dense[first_point] / 2 * last_point / first_point}
    axes.plot(list(guide), list(guide.values()), color=GREY, linewidth=1, linestyle=":")
    middle = (first_point * last_point) ** 0.5
    label_position = (middle, guide[first_point] * middle / first_point)
    axes.annotate("slope 1", label_position, (8, -10), textcoords="offset points", color=GREY)


def _title(sweep: AxisSweep, request: LayerRequest, hardware: Hardware) -> str:
    s = request.shape
    sizes = {"tokens": f"T {s.tokens:,}", "": f"d {s.d_model}", "experts": f"E {s.experts}", "top-k": f"k {s.top_k}"}
    fixed_sizes = ", ".join([text for axis, text in sizes.items() if axis != sweep.axis] + [f"f {s.d_expert:,}"])
    has_extrapolated = any(f.is_extrapolated for figures in sweep.points.values() for f in figures)
    has_static = any(has_masks(f.moe) for figures in sweep.points.values() for f in figures)
    remarks = "; static routing leaves the middle panel" * has_static
    remarks += "; dashed: not measured, extrapolated by the law of its masks" * has_extrapolated
    return (
        f"One layer, forward and backward; plain layer {fixed_sizes}; {request.dtype}; {hardware}\n"
        f"medians of {request.rounds} interleaved rounds{remarks}"
    )
