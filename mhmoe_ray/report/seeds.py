"""Difference of two variants, with its confidence interval, and the differences that a number of seeds can show."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mhmoe_ray.errors import DataError

CONFIDENCE, POWER = 0.95, 0.9
"""Confidence of intervals and tests, and the probability with which a detectable difference is found."""
MARGIN = 0.01
"""Difference of losses below which variants count as equal, by default; 0.01 nats are 1% of perplexity."""
MAX_SEEDS = 10_000
"""Number of seeds from which on `seeds_for` gives up."""


class MeanTest(NamedTuple):
    """Confidence interval of a mean difference, and the p-value of the hypothesis that it is 0."""

    low: float
    high: float
    p: float


class SeedValues(NamedTuple):
    """Values of two variants that are compared, such as their validation losses; each value belongs to one seed."""

    baseline: list[float]
    variant: list[float]
    paired: bool
    """Whether the two lists have the values of the same seeds, in the same order."""

    @property
    def seeds(self) -> int:
        """Number of seeds of the variant that has fewer of them."""
        return min(len(self.baseline), len(self.variant))

    @property
    def differences(self) -> list[float]:
        """Values of the variant minus those of the baseline: seed by seed if paired, else minus the baseline's mean."""
        if self.paired:
            return [b - a for a, b in zip(self.baseline, self.variant, strict=True)]
        return [b - statistics.fmean(self.baseline) for b in self.variant]

    @property
    def difference(self) -> float:
        """Mean of the variant's values minus the mean of the baseline's values."""
        return statistics.fmean(self.differences)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the difference of a seed of each variant; needs two seeds."""
        if self.paired:
            return statistics.stdev(self.differences)
        return math.hypot(statistics.stdev(self.baseline), statistics.stdev(self.variant))

    def test(self) -> MeanTest | None:
        """Return Student's t-test if the values are paired, else Welch's; None if one variant has a single seed.

        Without scipy, it is a DataError.
        """
        if self.seeds < 2:
            return None
        # A test has no result for differences without any deviation.
        if self.deviation == 0:
            return MeanTest(self.difference, self.difference, float(self.difference == 0))
        stats, a, b = _scipy_stats(), self.baseline, self.variant
        result = stats.ttest_rel(b, a) if self.paired else stats.ttest_ind(b, a, equal_var=False)
        interval = result.confidence_interval(CONFIDENCE)
        return MeanTest(float(interval.low), float(interval.high), float(result.pvalue))

    def power(self, difference: float, seeds: int) -> float:
        """Return the probability that `seeds` of each variant show a true difference of this size, by these values'
        deviation."""
        if self.deviation == 0:
            return 1.0
        stats, freedom = _scipy_stats(), (seeds - 1) * (1 if self.paired else 2)
        limit, shift = stats.t.ppf((1 + CONFIDENCE) / 2, freedom), difference * math.sqrt(seeds) / self.deviation
        # Beyond a shift of 30, the probability is 1, and scipy's distribution returns nan.
        return 1.0 if shift > 30 + limit else float(stats.nct.sf(limit, freedom, shift))

    def smallest_difference(self) -> float:
        """Return the smallest true difference that as many seeds as these show with probability `POWER`."""
        if self.deviation == 0:
            return 0.0
        from scipy.optimize import brentq

        upper = self.deviation
        while self.power(upper, self.seeds) < POWER:
            upper *= 2
        return float(brentq(lambda difference: self.power(difference, self.seeds) - POWER, 0, upper))

    def seeds_for(self, difference: float) -> int | None:
        """Return how many seeds of each variant show a true difference with probability `POWER`; None above
        `MAX_SEEDS`."""
        if self.power(difference, MAX_SEEDS) < POWER:
            return None
        low, high = 1, MAX_SEEDS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(difference, middle) >= POWER else (middle, high)
        return high


def correct_for_number(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for the number of tests, by Holm's method."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as e:
        raise DataError("intervals", "scipy is missing", "pip install 'mhmoe-ray[report]'") from e
    return stats


def pair_values(baseline: Mapping[int, float], variant: Mapping[int, float]) -> SeedValues | None:
    """Return the values of two variants, which are given by seed; None if one variant has no values.

    They are paired if the variants have two or more seeds in common, or if all seeds of one are also seeds of the
    other.
    """
    if not baseline or not variant:
        return None
    common = sorted(baseline.keys() & variant.keys())
    if len(common) > 1 or len(common) == min(len(baseline), len(variant)):
        return SeedValues([baseline[seed] for seed in common], [variant[seed] for seed in common], paired=True)
    return SeedValues(list(baseline.values()), list(variant.values()), paired=False)
