"""Difference of two variants, with its confidence interval."""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from mhmoe_ray.errors import DataError

CONFIDENCE = 0.95


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

    def interval(self) -> tuple[float, float] | None:
        """Return the confidence interval of the mean difference; None if one variant has a single seed.

        It is that of Student's t-test if the values are paired, else of Welch's; without scipy, it is a DataError.
        """
        if self.seeds < 2:
            return None
        try:
            from scipy import stats
        except ImportError as e:
            raise DataError("intervals", "scipy is missing", "pip install 'mhmoe-ray[report]'") from e
        a, b = self.baseline, self.variant
        test = stats.ttest_rel(b, a) if self.paired else stats.ttest_ind(b, a, equal_var=False)
        interval = test.confidence_interval(CONFIDENCE)
        return float(interval.low), float(interval.high)


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
