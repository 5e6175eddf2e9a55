"""Picture of a sweep: time, its ratio to the dense layer, and peak memory of each layer along the axis."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mhmoe_ray.bench.layers import has_masks
from mhmoe_ray.bench.measure import Figures, Request
from mhmoe_ray.bench.sweep import AXES, Sweep
from mhmoe_ray.bench.timing import Hardware
from mhmoe_ray.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, save, short, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = {"dense": BLACK, "SMoE": BLUE, "X-MoE": SKY, "fine-grained": GREEN, "transformers": PURPLE, "DeepSpeed": GREY}
OF_HEADS = (VERMILION, ORANGE)
"""Colours of multi-head layers in their order, reused from the first if there are more; marks tell these apart."""
MARKS = "osD^vPX<>*pd"


class Style(NamedTuple):
    colour: str
    mark: str
    hollow: bool
    """Whether marks are hollow, as for static routing and for other packages."""


def plot(swept: Sweep, request: Request, hardware: Hardware, path: Path) -> None:
    """Draw a sweep and write it as a PNG.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    with style():
        save(picture(swept, request, hardware), path)


def picture(swept: Sweep, request: Request, hardware: Hardware) -> "Figure":
    """Draw a sweep as three panels and a legend."""
    figure = new_figure(13, 4.6)
    time, ratio, memory = figure.subplots(1, 3)
    dense = {at: figures[0].median for at, figures in swept.points.items()}
    styles = styles_of(swept.series)
    for name, along in swept.series.items():
        _draw(time, along, {at: f.median for at, f in along.items()}, styles[name], name)
        _draw(ratio, along, {at: f.median / dense[at] for at, f in along.items()}, styles[name])
        _draw(memory, along, {at: f.peak / 1e9 for at, f in along.items()}, styles[name])
    dropless = [f.median / dense[at] for at, here in swept.points.items() for f in here if not has_masks(f.moe)]
    ratio.set_ylim(min(dropless) / 1.15, max(dropless) * 1.15)  # static routing would flatten all others
    for axes, title in ((time, "time (s)"), (ratio, "time, ratio to dense"), (memory, "peak memory (GB)")):
        _finish(axes, swept, title)
    if AXES[swept.over].grows:
        _guide(time, dense)
    figure.legend(loc="outside right center", handlelength=2.4, labelspacing=0.7)
    figure.suptitle(_says(swept, request, hardware), x=0.01, ha="left", fontsize="medium")
    return figure


def styles_of(series: dict[str, dict[int, Figures]]) -> dict[str, Style]:
    """Return the style of each layer.

    The colour shows the kind of layer, so that static routing and other kernels share it; the mark shows the order.
    """
    heads: dict[str, str] = {}
    styles = {}
    for i, (name, along) in enumerate(series.items()):
        base = name.partition(",")[0].removesuffix(" static")
        if base.startswith("MH-MoE"):
            colour = heads.setdefault(base, OF_HEADS[len(heads) % len(OF_HEADS)])
        else:
            colour = COLOURS[base if base in COLOURS else base.partition(" ")[0]]
        hollow = name.endswith(" static") or next(iter(along.values())).package is not None
        styles[name] = Style(colour, MARKS[i % len(MARKS)], hollow)
    return styles


def _draw(axes: "Axes", along: dict[int, Figures], values: dict[int, float], style: Style, label: str = "") -> None:
    measured = [at for at in along if not along[at].extrapolated]
    beyond = [at for at in along if along[at].extrapolated]
    look: dict[str, Any] = {
        "color": style.colour,
        "marker": style.mark,
        "markersize": 5.5,
        "linewidth": 1.1 if style.hollow else 1.6,
        "markerfacecolor": "white" if style.hollow else style.colour,
    }
    axes.plot(measured, [values[at] for at in measured], label=label or "_", **look)
    if beyond:
        dashed = [*measured[-1:], *beyond]
        axes.plot(dashed, [values[at] for at in dashed], linestyle=(0, (4, 2)), zorder=1.9, **look)


def _finish(axes: "Axes", swept: Sweep, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_title(title, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(swept.points), labels := [short(at) for at in swept.points])
    axes.set_xlabel(AXES[swept.over].label + (" (1K = 1,024)" if "K" in "".join(labels) else ""))
    low, high = axes.get_ylim()
    within_decades = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high / low < 5 else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=within_decades if high / low < 200 else (1,), numticks=99))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(True, linewidth=0.5, alpha=0.35)


def _guide(axes: "Axes", dense: dict[int, float]) -> None:
    """Draw a line of slope 1 below all others."""
    first, last = min(dense), max(dense)
    at = {first: dense[first] / 2, last: dense[first] / 2 * last / first}
    axes.plot(list(at), list(at.values()), color=GREY, linewidth=1, linestyle=":")
    middle = (first * last) ** 0.5
    place = (middle, at[first] * middle / first)
    axes.annotate("slope 1", place, (8, -10), textcoords="offset points", color=GREY)


def _says(swept: Sweep, request: Request, hardware: Hardware) -> str:
    s = request.shape
    sizes = {"tokens": f"T {s.tokens:,}", "": f"d {s.d_model}", "experts": f"E {s.experts}", "top-k": f"k {s.top_k}"}
    fixed = ", ".join([text for axis, text in sizes.items() if axis != swept.over] + [f"f {s.d_expert:,}"])
    drawn = any(f.extrapolated for figures in swept.points.values() for f in figures)
    static = any(has_masks(f.moe) for figures in swept.points.values() for f in figures)
    remarks = "; static routing leaves the middle panel" * static
    remarks += "; dashed: not measured, drawn on by the law of its masks" * drawn
    return (
        f"One layer, forward and backward; plain layer {fixed}; {request.dtype}; {hardware}\n"
        f"medians of {request.rounds} interleaved rounds{remarks}"
    )
