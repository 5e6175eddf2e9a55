"""Plots of a report. Each is as narrow as a phone, so that a page can place them side by side or below each other."""

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mhmoe_ray.evaluate import activation
from mhmoe_ray.plotting import COLOURS, ROW_INCHES, new_figure
from mhmoe_ray.report.figures import RouteSummary, RunFigures
from mhmoe_ray.report.variants import Variant, loss_unit, losses_at
from mhmoe_ray.runs import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
WIDTH, HEIGHT = 4.2, 3.0
MAX_POINTS = 300
"""Largest number of points of a curve; more could not be told apart on a page."""
LEGEND_INCHES, LEGEND_CHARACTERS = 0.18, 24
"""Height of a legend row in inches, and the name length up to which a row has two names."""
MAX_NAME_LENGTH = 20
"""Largest number of characters of a name beside a bar; a longer name is broken into several lines."""

AxisValue = Callable[[RunFigures, dict[str, Any]], float]
"""Function (run, line of metrics) that returns the position of the line on a horizontal axis, such as its tokens."""

AXES: dict[str, tuple[str, AxisValue]] = {
    "steps": ("steps", lambda run, line: line[metrics.STEP]),
    "tokens": ("tokens", lambda run, line: line[metrics.TOKENS]),
    "flops": ("training FLOPs", lambda run, line: run.flops(line[metrics.TOKENS])),
}


def _figure_with_legend_room(names: Sequence[str] = (), height: float = HEIGHT) -> "tuple[Figure, Axes]":
    """Return a new figure of this height in inches, and its axes; room for a legend of these names is added below."""
    rows = -(-len(names) // _legend_columns(names)) if len(names) > 1 else 0
    figure = new_figure(WIDTH, height + rows * LEGEND_INCHES)
    return figure, figure.subplots()


def _legend_columns(names: Sequence[str]) -> int:
    return 2 if max(map(len, names), default=0) <= LEGEND_CHARACTERS else 1


def _add_legend(figure: "Figure", axis: "Axes") -> None:
    """Place the legend below the axes, where it hides no curve."""
    # A single name needs no legend, because the page shows the name in its title.
    handles, names = axis.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside lower center", ncols=_legend_columns(names))


def _use_integer_steps(axis: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def line_style(number: int) -> dict[str, Any]:
    """Return matplotlib's colour and dashes for the curve of a variant, given its position among all variants."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def _draw_band(
    axis: "Axes", x: Sequence[float], mean: Any, band: tuple[Any, Any] | None, name: str, number: int
) -> None:
    """Draw means as a curve, with a band from the lower to the upper values if there are any."""
    style = line_style(number)
    axis.plot(x, mean, label=name, marker=".", markersize=4, **style)
    if band:
        axis.fill_between(x, *band, color=style["color"], alpha=0.15, linewidth=0)


def draw_validation(variants: Sequence[Variant], axis_name: str) -> "Figure":
    """Draw the validation loss of each variant: the mean over seeds, with a band from the lowest to the highest."""
    title, x_of = AXES[axis_name]
    figure, axis = _figure_with_legend_room([variant.name for variant in variants])
    for number, variant in enumerate(variants):
        run = variant.first_run
        steps = sorted(set.intersection(*(set(r.validations) for r in variant.runs)))
        lines = {line[metrics.STEP]: line for line in run.lines}
        if not steps:
            continue
        x = [x_of(run, lines[step]) for step in steps]
        losses_SR = np.array([[r.validations[step] for r in variant.runs] for step in steps])
        band = (losses_SR.min(1), losses_SR.max(1)) if losses_SR.shape[1] > 1 else None
        _draw_band(axis, x, losses_SR.mean(1), band, variant.name, number)
    _scale_to_later_losses(axis, variants)
    axis.set(xlabel=title, ylabel=loss_unit(variants), title=f"validation loss against {title}")
    has_perplexity = not any(variant.has_summed_loss for variant in variants)
    if has_perplexity and metrics.perplexity(axis.get_ylim()[1]) is not None:
        second = axis.secondary_yaxis("right", functions=(np.exp, lambda y: np.log(np.maximum(y, 1e-9))))
        second.set_ylabel("perplexity")
    if axis_name == "steps":
        _use_integer_steps(axis)
    _add_legend(figure, axis)
    return figure


def has_curve(variants: Sequence[Variant]) -> bool:
    """Return whether a variant was validated more than once: a single validation is a number, not a curve."""
    return any(len(run.validations) > 1 for variant in variants for run in variant.runs)


def draw_differences(variants: Sequence[Variant], baseline: Variant) -> "Figure":
    """Draw each variant's loss minus the baseline's over tokens: the mean over seeds and its confidence interval."""
    figure, axis = _figure_with_legend_room([variant.name for variant in variants])
    axis.axhline(0, label=baseline.name, linewidth=1, **line_style(variants.index(baseline)))
    for number, variant in enumerate(variants):
        if variant is baseline:
            continue
        steps = sorted(set.intersection(*(set(r.validations) for r in (*variant.runs, *baseline.runs))))
        if not steps:
            continue
        losses = [pair for step in steps if (pair := losses_at(step, baseline, variant)) is not None]
        tests = [test for pair in losses if (test := pair.test()) is not None]
        band = ([test.low for test in tests], [test.high for test in tests]) if tests else None
        tokens = {line[metrics.STEP]: line[metrics.TOKENS] for line in variant.first_run.lines}
        x = [tokens[step] for step in steps]
        _draw_band(axis, x, [pair.difference for pair in losses], band, variant.name, number)
    axis.set(xlabel="tokens", ylabel=loss_unit(variants), title=f"validation loss less that of {baseline.name}")
    _add_legend(figure, axis)
    return figure


def _scale_to_later_losses(axis: "Axes", variants: Sequence[Variant]) -> None:
    """Scale the vertical axis to the validation losses in the last three quarters of each run."""
    # The limits leave out the first losses, which are much higher and would squeeze the differences between later ones.
    later_losses, all_losses = [], []
    for variant in variants:
        for run in variant.runs:
            losses = [loss for _, loss in sorted(run.validations.items())]
            later_losses += losses[len(losses) // 4 :]
            all_losses += losses
    if later_losses and max(all_losses) > min(later_losses):
        room = 0.08 * (max(later_losses) - min(later_losses)) or 0.05
        axis.set_ylim(min(later_losses) - room, max(later_losses) + room)


def draw_curve(variants: Sequence[Variant], metric: str, title: str, label: str) -> "Figure | None":
    """Draw a metric of each variant's first run over steps, smoothed; None if no run has it or it is always 0."""
    figure, axis = _figure_with_legend_room([variant.name for variant in variants])
    is_drawn = False
    for number, variant in enumerate(variants):
        points = [(ln[metrics.STEP], ln[metric]) for ln in variant.first_run.lines if ln.get(metric) is not None]
        if not any(value for _, value in points):
            continue
        is_drawn = True
        step, value = np.array(points, float).T
        window = max(1, len(value) // 50)
        smooth = np.convolve(value, np.ones(window) / window, "valid")
        step = step[window - 1 :]
        indices = np.unique(np.linspace(0, len(smooth) - 1, min(MAX_POINTS, len(smooth))).astype(int))
        axis.plot(step[indices], smooth[indices], label=variant.name, linewidth=1.2, **line_style(number))
    axis.set(xlabel="steps", ylabel=label, title=title)
    if not is_drawn:
        return None
    _use_integer_steps(axis)
    _add_legend(figure, axis)
    return figure


def draw_throughput(variants: Sequence[Variant]) -> "Figure":
    """Draw the tokens per second of each variant as a bar, with a mark for each of its runs."""
    figure, axis = _figure_with_legend_room(height=max(HEIGHT, 0.9 + 0.36 * len(variants)))
    for number, variant in enumerate(variants):
        if variant.tokens_per_s is not None:
            speeds = [run.tokens_per_s for run in variant.runs if run.tokens_per_s is not None]
            axis.barh(number, variant.tokens_per_s, color=line_style(number)["color"], alpha=0.8)
            axis.plot(speeds, [number] * len(speeds), "k|", markersize=8)
    axis.set_yticks(range(len(variants)), [textwrap.fill(v.name, MAX_NAME_LENGTH) for v in variants])
    axis.invert_yaxis()
    axis.set(xlabel="tokens/s, median over steps", title="throughput in training")
    return figure


def draw_heat_map(name: str, routes: RouteSummary, max_load: float) -> "Figure":
    """Draw the loads of a model's experts with a row per layer, coloured up to `max_load` on all maps of a page."""
    layers, experts = routes.load.shape
    figure, axis = _figure_with_legend_room(height=1.15 + ROW_INCHES * layers)
    image = axis.imshow(routes.load, aspect="auto", cmap="viridis", vmin=0, vmax=max_load, interpolation="nearest")
    axis.set(xlabel="expert", ylabel="layer", title=f"{name}: load of experts")
    axis.set_yticks(range(layers))
    axis.set_xticks(sorted({0, *range(0, experts, max(1, experts // 8))}))
    figure.colorbar(image, ax=axis, label="1 is uniform")
    return figure


def draw_activation(
    routes_by_name: dict[str, RouteSummary], colours: dict[str, int], relative: bool
) -> "Figure | None":
    """Draw the share of experts in use as a function of the threshold above which an expert counts as in use.

    The threshold is a multiple of a uniform load if `relative`, else a share of tokens. `colours` are numbers for
    `line_style`. Return None if no variant has these shares.
    """
    figure, axis = _figure_with_legend_room(list(routes_by_name))
    is_drawn = False
    for name, routes in routes_by_name.items():
        shares = routes.activated_relative if relative else routes.activated
        if shares is None:
            continue
        is_drawn = True
        thresholds = activation.RELATIVE_THRESHOLDS if relative else activation.THRESHOLDS
        axis.plot(thresholds, [100 * s for s in shares], marker=".", label=name, **line_style(colours[name]))
    if not relative:
        axis.set_xscale("log")
    share_of = "of a uniform load" if relative else "of the tokens above which it is in use"
    axis.set(xlabel=f"threshold: share {share_of}", ylabel="per cent of experts", ylim=(-3, 103))
    axis.set_title("experts in use, beside a uniform load" if relative else "experts in use")
    if not is_drawn:
        return None
    _add_legend(figure, axis)
    return figure
