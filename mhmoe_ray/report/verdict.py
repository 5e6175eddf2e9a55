"""Which of two variants is better, and how sure that is."""

import statistics
from typing import NamedTuple

from mhmoe_ray.errors import DataError
from mhmoe_ray.report.variants import Losses, Variant, losses_at
from mhmoe_ray.runs import metrics

CONFIDENCE = 0.95


class Verdict(NamedTuple):
    """On the difference of validation losses, the other's less the baseline's, in nats per token."""

    baseline: str
    other: str
    step: int
    difference: float
    low: float | None
    """Of the interval that holds the true difference with CONFIDENCE, by Student's t; None with one seed."""
    high: float | None
    seeds: int
    """Of the variant with fewer."""
    paired: bool
    """Differences were taken seed by seed, over the seeds that both have."""

    @property
    def is_clear(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def said(self) -> str:
        """In a sentence."""
        word = "lower" if self.difference < 0 else "higher"
        figures = f"{abs(self.difference):.4f} nats {word}"
        if (ratio := metrics.perplexity(self.difference)) is not None:
            figures += f", perplexity {100 * abs(ratio - 1):.1f}% {word}"
        if self.low is None:
            return f"{self.other} to {self.baseline}: {figures}; one seed, so nobody knows how sure that is"
        how = f"{self.seeds} seeds{', paired' if self.paired else ''}"
        interval = f"{CONFIDENCE:.0%} interval {self.low:+.4f} to {self.high:+.4f}, {how}"
        if self.is_clear:
            return f"{self.other} to {self.baseline}: {figures} ({interval})"
        return f"{self.other} to {self.baseline}: not told apart; {figures} ({interval})"


def verdict(baseline: Variant, other: Variant, step: int) -> Verdict | None:
    """Args:
    baseline, other: to compare.
    step: that both were validated at.

    Returns:
        None where one of them has no loss there.

    Raises:
        DataError: scipy is not installed.
    """
    losses = losses_at(step, baseline, other)
    if losses is None:
        return None
    seeds = min(len(losses.baseline), len(losses.other))
    low, high = _interval(losses) if seeds > 1 else (None, None)
    difference = statistics.fmean(losses.differences)
    return Verdict(baseline.name, other.name, step, difference, low, high, seeds, losses.paired)


def _interval(losses: Losses) -> tuple[float, float]:
    """Of the mean difference: Student's where they are pairs, else Welch's."""
    try:
        from scipy import stats
    except ImportError as e:
        raise DataError("intervals", "scipy is missing", "pip install 'mhmoe-ray[report]'") from e
    a, b = losses.baseline, losses.other
    test = stats.ttest_rel(b, a) if losses.paired else stats.ttest_ind(b, a, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)
