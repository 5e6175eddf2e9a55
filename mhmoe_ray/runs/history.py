"""The history of a run's metrics: metrics.jsonl, a line per step, and looks into it.

A history may have a million lines, so `course` reads only a few of them. Nothing here needs torch.
"""

import math
from collections.abc import Iterable
from itertools import islice, pairwise
from typing import Any, NamedTuple

from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.jsonl import Glimpse
from mhmoe_ray.runs.metrics import GROUP, METRICS, STEP, TIME, TOKENS, TOKENS_PER_S, VAL_LOSS


def append(run: RunDir, line: dict[str, Any]) -> None:
    """Add a step's line. A number that is not finite, for which JSON has no word, becomes null."""
    assert line.keys() <= METRICS.keys(), f"not in the registry: {line.keys() - METRICS.keys()}"
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    jsonl.append(run.metrics_file, finite, at_once=False)


def flush(run: RunDir) -> None:
    """Return when all lines of this process can be read; at once but on an object store."""
    jsonl.flush(run.metrics_file)


def read(run: RunDir) -> list[dict[str, Any]]:
    """One line per step, in order: the effective history, where a restart has taken the place of what it repeated."""
    # On an object store segments are in the order of their writers' clocks, and a later start may be on another node.
    return effective(sorted(jsonl.read(run.metrics_file), key=lambda line: line.get(GROUP, 0)))


def effective(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that a later one has taken the place of."""
    found: list[dict[str, Any]] = []
    for line in lines:
        while found and found[-1][STEP] >= line[STEP]:
            found.pop()
        found.append(line)
    return found


def last(run: RunDir) -> dict[str, Any] | None:
    """The newest line."""
    return next(Glimpse(run.metrics_file).backwards(), None)


class Course(NamedTuple):
    recent: list[dict[str, Any]]
    """Of the effective history, the newest lines."""
    validation: dict[str, Any] | None
    """The newest line with a validation."""
    curve: list[dict[str, Any]]
    """Lines from all over the effective history, in order; all of it where it is short."""
    start: dict[str, Any] | None
    """The first line of the newest start of workers."""

    @property
    def last(self) -> dict[str, Any] | None:
        return self.recent[-1] if self.recent else None

    @property
    def rate(self) -> float | None:
        """Tokens a second over the recent steps, by the time that these took."""
        pairs = [(b[TOKENS] - a[TOKENS], b[TOKENS_PER_S]) for a, b in pairwise(self.recent) if a[GROUP] == b[GROUP]]
        seconds = sum(tokens / rate for tokens, rate in pairs if tokens)
        return float(sum(tokens for tokens, _ in pairs) / seconds) if seconds else None

    @property
    def mean_rate(self) -> float | None:
        """Tokens a second since the newest start of workers, by the clock: validations and pauses are in it."""
        if self.last is None or self.start is None or self.last[TIME] <= self.start[TIME]:
            return None
        return float((self.last[TOKENS] - self.start[TOKENS]) / (self.last[TIME] - self.start[TIME]))


RECENT = 20
CURVE = 60


def course(run: RunDir, validate_every: int) -> Course:
    """Args:
    run: its directory.
    validate_every: steps between two of its validations.
    """
    file = Glimpse(run.metrics_file)
    newest = list(islice(file.backwards(), CURVE))[::-1]
    if not newest:
        return Course([], None, [], None)
    recent, last_step, group = effective(newest), newest[-1][STEP], newest[-1][GROUP]
    validation = None
    for line in file.backwards():
        # One that was repeated after a restart has a newer line; one that is yet to be repeated does not count.
        if VAL_LOSS in line and line[STEP] <= last_step:
            validation = line
            break
        if line[STEP] <= last_step - validate_every:
            break
    short = len(newest) < CURVE
    return Course(
        recent[-RECENT:],
        validation,
        recent if short else effective([*file.spread(CURVE), newest[-1]]),
        file.first(lambda line: line[GROUP] >= group),
    )
