"""Sweep: measurement of layers at several values (points) of one size (axis), and the growth of their cost.

The axis is the number of tokens, of experts, of experts per row, or of heads. Static routing is measured up to
`measure.STATIC_ROWS` rows. For more tokens T its cost is extrapolated as a T + b T^2: experts compute T rows, and the
masks have T x E C values, where E C (experts times expert capacity) grows with T.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from mhmoe_ray.bench.layers import SkippedCase, has_masks
from mhmoe_ray.bench.measure import LayerFigures, LayerRequest, measure, requested_layers
from mhmoe_ray.bench.timing import Hardware

AxisName = Literal["tokens", "experts", "top-k", "heads"]


class Axis(NamedTuple):
    """Size that varies from point to point, with its default points."""

    label: str
    points: tuple[int, ...]
    work_grows: bool = True
    """True if work grows along the axis; otherwise it should stay the same."""


AXES: dict[AxisName, Axis] = {
    "tokens": Axis("tokens T", (1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    "experts": Axis("experts E, multiply-adds unchanged", (8, 16, 32, 64), work_grows=False),
    "top-k": Axis("experts k of a row", (1, 2, 4, 8)),
    "heads": Axis("heads h, multiply-adds unchanged", (1, 2, 4, 8), work_grows=False),
}


class AxisSweep(NamedTuple):
    """Measurements of all layers at each point of an axis."""

    axis: AxisName
    points: dict[int, list[LayerFigures]]
    """Measurements at each point, with the dense layer and the plain one first."""
    skipped: list[SkippedCase]

    @property
    def series(self) -> dict[str, dict[int, LayerFigures]]:
        """Measurements of each layer by point, in the order in which the layers first appear."""
        names = dict.fromkeys(f.name for figures in self.points.values() for f in figures)
        return {
            name: {point: f for point, figures in self.points.items() for f in figures if f.name == name}
            for name in names
        }

    @property
    def growth(self) -> dict[str, float]:
        """Growth of the time along the axis, for each layer that was measured at two points or more.

        If work grows along the axis, it is the exponent of a power law (1 is linear), else the longest time divided by
        the shortest, minus 1.
        """
        measure_growth = fit_exponent if AXES[self.axis].work_grows else relative_spread
        measured_times = {
            name: [(point, f.median) for point, f in layer_figures.items() if not f.is_extrapolated]
            for name, layer_figures in self.series.items()
        }
        return {name: measure_growth(pairs) for name, pairs in measured_times.items() if len(pairs) > 1}


def sweep(
    request: LayerRequest, axis: AxisName, points: Sequence[int], hardware: Hardware, report: Callable[[str], None]
) -> AxisSweep:
    """Measure every layer at every point of an axis, in interleaved rounds at each point.

    The SpecErrors are those of `measure`, and come before any measurement if sizes are impossible.
    """
    requests = {point: _request_at(request, axis, point) for point in sorted(set(points))}
    for point_request in requests.values():
        # This call raises an error for impossible sizes, before other points are measured for minutes.
        requested_layers(point_request, hardware.device)
    results = {}
    for point, point_request in requests.items():
        results[point] = measure(point_request, hardware, partial(_report_at, report, f"{axis} {point:,}"))
    skipped = list(dict.fromkeys(case for result in results.values() for case in result.skipped))
    figures = {point: result.figures for point, result in results.items()}
    # Along the axis of heads, "MH-MoE h 2" and "MH-MoE h 4" are points of one line, so the number is removed from the
    # names.
    if axis == "heads":
        figures = {
            point: [f._replace(name=f.name.replace(f" h {point}", "")) for f in point_figures]
            for point, point_figures in figures.items()
        }
    sweep_result = AxisSweep(axis, figures, skipped)
    return extrapolate_static(sweep_result) if axis == "tokens" else sweep_result


def _report_at(report: Callable[[str], None], point: str, line: str) -> None:
    report(f"{point}: {line}")


def _request_at(request: LayerRequest, axis: AxisName, point: int) -> LayerRequest:
    if axis == "heads":
        return request._replace(heads=[point])
    return request._replace(shape=request.shape._replace(**{axis.replace("-", "_"): point}))


def extrapolate_static(sweep_result: AxisSweep) -> AxisSweep:
    """Return a sweep over tokens, to which extrapolated costs of static routing are added where it was not measured.

    Static routing then no longer counts as skipped.
    """
    points = {point: list(figures) for point, figures in sweep_result.points.items()}
    static_figures = {
        name: layer_figures
        for name, layer_figures in sweep_result.series.items()
        if has_masks(next(iter(layer_figures.values())).moe)
    }
    for layer_figures in static_figures.values():
        last_figures = layer_figures[max(layer_figures)]
        for point in (point for point in points if point > max(layer_figures)):
            median = extrapolate([(t, f.median) for t, f in layer_figures.items()], point)
            peak = round(extrapolate([(t, f.peak_bytes) for t, f in layer_figures.items()], point))
            extrapolated_figures = last_figures._replace(
                median=median, seconds=[], peak_bytes=peak, saved_bytes=None, is_extrapolated=True
            )
            points[point].append(extrapolated_figures)
    return sweep_result._replace(
        points=points, skipped=[a for a in sweep_result.skipped if a.name not in static_figures]
    )


def extrapolate(measured_values: Sequence[tuple[int, float]], tokens: int) -> float:
    """Extrapolate a cost that grows as a T + b T^2 to T = `tokens`, from pairs of T and value.

    The factors a and b are at least 0 and have the least relative error for the three largest T. From a single value
    only b is fitted.
    """
    # Only the three largest numbers of tokens T are used, because costs that are not of the form a T + b T^2 have more
    # weight at smaller T.
    t, y = (np.array(values, dtype=float) for values in zip(*sorted(measured_values)[-3:], strict=True))

    def fit_factors(powers: list[int]) -> Any:
        terms = np.stack([(t / tokens) ** power for power in powers], axis=1)
        return np.linalg.lstsq(terms / y[:, None], np.ones(len(t)), rcond=None)[0]

    factors = fit_factors([2] if len(t) == 1 else [1, 2])
    # Costs are not negative, but noise or a cost that does not grow can give the fit a negative factor. The other term
    # is then fitted alone.
    if (factors < 0).any():
        factors = fit_factors([2] if factors[0] < 0 else [1])
    return float(factors.sum())


def fit_exponent(measured_values: Sequence[tuple[int, float]]) -> float:
    """Return the exponent p of the best fit y = c t^p on logarithmic axes."""
    slope, _ = np.polyfit([math.log(t) for t, _ in measured_values], [math.log(y) for _, y in measured_values], 1)
    return float(slope)


def relative_spread(measured_values: Sequence[tuple[int, float]]) -> float:
    """Return max / min - 1 of the values, which are the second entries of the pairs."""
    return max(y for _, y in measured_values) / min(y for _, y in measured_values) - 1
