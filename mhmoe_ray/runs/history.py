"""History of a run's metrics: metrics.jsonl, one line per step, and queries on it.

A history may have a million lines, of which `read_trend` reads only a few. This module does not need torch.
"""

import math
from collections.abc import Iterable
from itertools import islice, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.jsonl import JsonlSnapshot
from mhmoe_ray.runs.metrics import GROUP, METRICS, STEP, TIME, TOKENS, TOKENS_PER_S, VAL_LOSS, parse_line


def append(run: RunDir, line: dict[str, Any]) -> None:
    """Append the metrics of a step to metrics.jsonl, with null for each number that is not finite.

    On an object store, the line may stay in memory until the next `append` or `flush` writes it.
    """
    assert line.keys() <= METRICS.keys(), f"not in the registry: {line.keys() - METRICS.keys()}"
    jsonl.append(run.metrics_file, {name: _to_json(value) for name, value in line.items()}, immediate=False)


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(number) for key, number in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flush(run: RunDir) -> None:
    """Write the lines that this process still holds in memory, which it does only for an object store."""
    jsonl.flush(run.metrics_file)


def read(run: RunDir) -> list[dict[str, Any]]:
    """Return the effective history of a run's metrics (`effective_lines`)."""
    # On an object store, lines are in the order of their writers' clocks, and these differ between nodes. Sorting by
    # worker group restores the true order.
    return effective_lines(sorted(jsonl.read(run.metrics_file, parse_line), key=itemgetter(GROUP)))


def effective_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per step, in order: a line replaces earlier lines of the same or a later step.

    Such earlier lines exist if a worker group was restarted from a checkpoint and repeats the steps since then.
    """
    effective: list[dict[str, Any]] = []
    for line in lines:
        while effective and effective[-1][STEP] >= line[STEP]:
            effective.pop()
        effective.append(line)
    return effective


def last_line(run: RunDir) -> dict[str, Any] | None:
    """Return the newest line of a run's metrics.jsonl; None if there is none."""
    return next(JsonlSnapshot(run.metrics_file, parse_line).lines_backwards(), None)


class Trend(NamedTuple):
    """Excerpt of the history of a run's metrics."""

    recent_lines: list[dict[str, Any]]
    """Newest effective lines, at most `RECENT_LINES`."""
    validation_line: dict[str, Any] | None
    """Newest line with a validation loss."""
    curve: list[dict[str, Any]]
    """Lines spread evenly over the effective history, in order; all lines of a short history."""
    start_line: dict[str, Any] | None
    """First line of the newest worker group."""

    @property
    def last_line(self) -> dict[str, Any] | None:
        return self.recent_lines[-1] if self.recent_lines else None

    @property
    def rate(self) -> float | None:
        """Tokens per second over the recent steps, without the time between steps; None if there are too few."""
        pairs = [
            (b[TOKENS] - a[TOKENS], b[TOKENS_PER_S]) for a, b in pairwise(self.recent_lines) if a[GROUP] == b[GROUP]
        ]
        seconds = sum(tokens / rate for tokens, rate in pairs if tokens and rate)
        return float(sum(tokens for tokens, _ in pairs) / seconds) if seconds else None

    @property
    def mean_rate(self) -> float | None:
        """Tokens per second since the newest worker group's first line, with all pauses; None at that line."""
        if self.last_line is None or self.start_line is None or self.last_line[TIME] <= self.start_line[TIME]:
            return None
        return float(
            (self.last_line[TOKENS] - self.start_line[TOKENS]) / (self.last_line[TIME] - self.start_line[TIME])
        )


# Number of recent steps over which the speed of a run is averaged.
RECENT_LINES = 20
# Number of lines from which `mhmoe status` draws the loss curve.
CURVE_LINES = 60


def read_trend(run: RunDir, validate_every: int) -> Trend:
    """Return recent lines, the newest validation and the loss curve, without reading the whole file."""
    file = JsonlSnapshot(run.metrics_file, parse_line)
    newest_lines = list(islice(file.lines_backwards(), CURVE_LINES))[::-1]
    if not newest_lines:
        return Trend([], None, [], None)
    recent_lines, last_step, group = effective_lines(newest_lines), newest_lines[-1][STEP], newest_lines[-1][GROUP]
    validation_line = None
    for line in file.lines_backwards():
        # A worker group that restarted will repeat the steps after `last_step`, so a validation of such a step does not
        # count.
        if VAL_LOSS in line and line[STEP] <= last_step:
            validation_line = line
            break
        if line[STEP] <= last_step - validate_every:
            break
    is_short = len(newest_lines) < CURVE_LINES
    return Trend(
        recent_lines[-RECENT_LINES:],
        validation_line,
        recent_lines if is_short else effective_lines([*file.sample_lines(CURVE_LINES), newest_lines[-1]]),
        file.first_match(lambda line: line[GROUP] >= group),
    )
