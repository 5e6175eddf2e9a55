"""Which of two variants is better, and how sure that is."""

from typing import NamedTuple

from mhmoe_ray.errors import DataError
from mhmoe_ray.report.variants import Variant
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
        interval = f"95% interval {self.low:+.4f} to {self.high:+.4f}, {how}"
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
    a, b = baseline.losses(step), other.losses(step)
    if not a or not b:
        return None
    common = sorted(a.keys() & b.keys())
    if paired := len(common) > 1:
        a, b = {s: a[s] for s in common}, {s: b[s] for s in common}
    seeds = min(len(a), len(b))
    difference = sum(b.values()) / len(b) - sum(a.values()) / len(a)
    low, high = None, None
    if seeds > 1:
        low, high = _interval(list(a.values()), list(b.values()), paired)
    return Verdict(baseline.name, other.name, step, difference, low, high, seeds, paired)


def _interval(a: list[float], b: list[float], paired: bool) -> tuple[float, float]:
    """Of the mean of b less a: Student's where they are pairs, else Welch's."""
    try:
        from scipy import stats
    except ImportError as e:
        raise DataError("intervals", "scipy is missing", "pip install 'mhmoe-ray[report]'") from e
    test = stats.ttest_rel(b, a) if paired else stats.ttest_ind(b, a, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)
