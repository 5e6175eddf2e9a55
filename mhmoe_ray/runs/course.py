"""How a run went, from a few looks into its history, which may have a million lines."""

from itertools import islice, pairwise
from typing import Any, NamedTuple

from mhmoe_ray.runs.glimpse import Glimpse
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.metrics import GROUP, STEP, TIME, TOKENS, TOKENS_PER_S, VAL_LOSS, effective


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
