"""History of a run's metrics: metrics.jsonl, one line per step, and queries on it.

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
    """Append the line of a step.

    A number that is not finite becomes null, because JSON cannot express it.
    """
    assert line.keys() <= METRICS.keys(), f"not in the registry: {line.keys() - METRICS.keys()}"
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    jsonl.append(run.metrics_file, finite, at_once=False)


def flush(run: RunDir) -> None:
    """Return when all lines of this process can be read, which is at once except on an object store."""
    jsonl.flush(run.metrics_file)


def read(run: RunDir) -> list[dict[str, Any]]:
    """Return one line per step, in order.

    This is the effective history: after a restart, the steps that were repeated have their new lines only.
    """
    # On an object store segments are in the order of their writers' clocks, and a later start may be on another node.
    return effective(sorted(jsonl.read(run.metrics_file), key=lambda line: line.get(GROUP, 0)))


def effective(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines without those that a later line replaces, which are the ones before it of the same or a later
    step."""
    found: list[dict[str, Any]] = []
    for line in lines:
        while found and found[-1][STEP] >= line[STEP]:
            found.pop()
        found.append(line)
    return found


def last(run: RunDir) -> dict[str, Any] | None:
    """Return the newest line; None without any."""
    return next(Glimpse(run.metrics_file).backwards(), None)


class Course(NamedTuple):
    recent: list[dict[str, Any]]
    """Newest lines of the effective history, at most `RECENT`."""
    validation: dict[str, Any] | None
    """Newest line with a validation, None if there is none."""
    curve: list[dict[str, Any]]
    """Lines from all over the effective history, in order; all of it where it is short."""
    start: dict[str, Any] | None
    """First line of the newest worker group."""

    @property
    def last(self) -> dict[str, Any] | None:
        return self.recent[-1] if self.recent else None

    @property
    def rate(self) -> float | None:
        """Tokens per second over the recent steps, by the time that these steps took; None where there are too few."""
        pairs = [(b[TOKENS] - a[TOKENS], b[TOKENS_PER_S]) for a, b in pairwise(self.recent) if a[GROUP] == b[GROUP]]
        seconds = sum(tokens / rate for tokens, rate in pairs if tokens)
        return float(sum(tokens for tokens, _ in pairs) / seconds) if seconds else None

    @property
    def mean_rate(self) -> float | None:
        """Tokens per second since the newest worker group started, by the clock, validations and pauses included; None
        if no time has passed since its first line."""
        if self.last is None or self.start is None or self.last[TIME] <= self.start[TIME]:
            return None
        return float((self.last[TOKENS] - self.start[TOKENS]) / (self.last[TIME] - self.start[TIME]))


RECENT = 20
CURVE = 60


def course(run: RunDir, validate_every: int) -> Course:
    """Return recent lines, the newest validation and a curve of a run's history.

    Args:
        run: the run.
        validate_every: number of steps between two of its validations.
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
