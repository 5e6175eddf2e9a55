"""Sweep of layers along an axis: how their cost grows with tokens, experts, choices or heads.

Static routing is measured up to `measure.STATIC_ROWS` rows. Along tokens its cost is extrapolated from there by the law
a T + b T^2: experts see T rows, its masks have T x E C values, and E C grows with T.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from mhmoe_ray.bench.layers import Absent, has_masks
from mhmoe_ray.bench.measure import Figures, Request, measure, wanted
from mhmoe_ray.bench.timing import Hardware

Over = Literal["tokens", "experts", "top-k", "heads"]


class Axis(NamedTuple):
    label: str
    points: tuple[int, ...]
    """Default points of the axis."""
    grows: bool = True
    """Whether work grows along the axis; otherwise it should stay the same."""


AXES: dict[Over, Axis] = {
    "tokens": Axis("tokens T", (1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    "experts": Axis("experts E, multiply-adds unchanged", (8, 16, 32, 64), grows=False),
    "top-k": Axis("experts k of a row", (1, 2, 4, 8)),
    "heads": Axis("heads h, multiply-adds unchanged", (1, 2, 4, 8), grows=False),
}


class Sweep(NamedTuple):
    over: Over
    points: dict[int, list[Figures]]
    """Figures at each point of the axis, the dense layer first, then the plain one."""
    absent: list[Absent]

    @property
    def series(self) -> dict[str, dict[int, Figures]]:
        """Figures of each layer along the axis, with layers in the order in which they first appear."""
        names = dict.fromkeys(f.name for figures in self.points.values() for f in figures)
        return {
            name: {at: f for at, figures in self.points.items() for f in figures if f.name == name} for name in names
        }

    @property
    def growth(self) -> dict[str, float]:
        """Growth of the measured time of each layer that was measured at two points or more.

        If work grows along the axis, it is the exponent (1 is linear); if work stays the same, it is max / min - 1.
        """
        grow = exponent if AXES[self.over].grows else spread
        known = {
            name: [(at, f.median) for at, f in along.items() if not f.extrapolated]
            for name, along in self.series.items()
        }
        return {name: grow(pairs) for name, pairs in known.items() if len(pairs) > 1}


def sweep(
    request: Request, over: Over, points: Sequence[int], hardware: Hardware, note: Callable[[str], None]
) -> Sweep:
    """Measure every layer at every point, with all layers interleaved at each point.

    Raises:
        SpecError: in the same cases as `measure`.
    """
    requests = {at: _at(request, over, at) for at in sorted(set(points))}
    for one in requests.values():
        wanted(one, hardware.device)  # so that sizes that cannot be are refused before any is measured
    found = {}
    for at, one in requests.items():
        found[at] = measure(one, hardware, partial(_note_at, note, f"{over} {at:,}"))
    absent = list(dict.fromkeys(missing for measured in found.values() for missing in measured.absent))
    figures = {at: measured.figures for at, measured in found.items()}
    if over == "heads":  # one layer along the axis
        figures = {at: [f._replace(name=f.name.replace(f" h {at}", "")) for f in here] for at, here in figures.items()}
    swept = Sweep(over, figures, absent)
    return drawn_on(swept) if over == "tokens" else swept


def _note_at(note: Callable[[str], None], point: str, line: str) -> None:
    note(f"{point}: {line}")


def _at(request: Request, over: Over, at: int) -> Request:
    if over == "heads":
        return request._replace(heads=[at])
    return request._replace(shape=request.shape._replace(**{over.replace("-", "_"): at}))


def drawn_on(swept: Sweep) -> Sweep:
    """Return the sweep with static routing's figures extrapolated, by its law, to points beyond its measurements."""
    points = {at: list(figures) for at, figures in swept.points.items()}
    static = {name: known for name, known in swept.series.items() if has_masks(next(iter(known.values())).moe)}
    for known in static.values():
        last = known[max(known)]
        for at in (at for at in points if at > max(known)):
            median = by_law([(t, f.median) for t, f in known.items()], at)
            peak = round(by_law([(t, f.peak) for t, f in known.items()], at))
            beyond = last._replace(median=median, seconds=[], peak=peak, kept=None, extrapolated=True)
            points[at].append(beyond)
    return swept._replace(points=points, absent=[a for a in swept.absent if a.name not in static])


def by_law(known: Sequence[tuple[int, float]], at: int) -> float:
    """Return a T + b T^2 at T = `at`, with the a and b >= 0 of least relative error; from one point, b T^2.

    Args:
        known: pairs of T and value. The three with the largest T count: at smaller ones other costs weigh more.
        at: a value of T beyond them.
    """
    t, y = (np.array(values, dtype=float) for values in zip(*sorted(known)[-3:], strict=True))

    def fitted(powers: list[int]) -> Any:
        terms = np.stack([(t / at) ** power for power in powers], axis=1)
        return np.linalg.lstsq(terms / y[:, None], np.ones(len(t)), rcond=None)[0]

    factors = fitted([2] if len(t) == 1 else [1, 2])
    if (factors < 0).any():  # neither part can be; noise, or cost that does not grow, made it so
        factors = fitted([2] if factors[0] < 0 else [1])
    return float(factors.sum())


def exponent(known: Sequence[tuple[int, float]]) -> float:
    """Return the exponent p of the y = c t^p that fits best on logarithmic axes."""
    slope, _ = np.polyfit([math.log(t) for t, _ in known], [math.log(y) for _, y in known], 1)
    return float(slope)


def spread(known: Sequence[tuple[int, float]]) -> float:
    """Return max / min - 1 of the values."""
    return max(y for _, y in known) / min(y for _, y in known) - 1
