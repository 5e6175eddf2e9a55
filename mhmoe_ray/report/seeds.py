"""Values of two variants by seed, and the confidence interval of their difference."""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from mhmoe_ray.errors import DataError

CONFIDENCE = 0.95
"""Probability that an interval contains the true difference."""


class SeedValues(NamedTuple):
    """Values of two variants that are compared, such as their validation losses."""

    baseline: list[float]
    variant: list[float]
    paired: bool
    """Whether the values are paired by seed.

    Values are paired over the common seeds if there are two or more of them, or if one variant has no other seeds.
    """

    @property
    def seeds(self) -> int:
        """Number of seeds of the variant with fewer."""
        return min(len(self.baseline), len(self.variant))

    @property
    def differences(self) -> list[float]:
        """Values of the variant minus those of the baseline: seed by seed if paired, else minus the baseline's mean."""
        if self.paired:
            return [b - a for a, b in zip(self.baseline, self.variant, strict=True)]
        return [b - statistics.fmean(self.baseline) for b in self.variant]

    @property
    def difference(self) -> float:
        """Mean of the differences."""
        return statistics.fmean(self.differences)

    def interval(self) -> tuple[float, float] | None:
        """Return the confidence interval of the difference: Student's if paired, else Welch's; None with one seed.

        Raises:
            DataError: scipy is not installed.
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
    """Return the values of two variants, which are given by seed; None if one of them has none."""
    if not baseline or not variant:
        return None
    common = sorted(baseline.keys() & variant.keys())
    if len(common) > 1 or len(common) == min(len(baseline), len(variant)):
        return SeedValues([baseline[seed] for seed in common], [variant[seed] for seed in common], paired=True)
    return SeedValues(list(baseline.values()), list(variant.values()), paired=False)
