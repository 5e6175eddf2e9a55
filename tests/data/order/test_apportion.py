from fractions import Fraction
from math import ceil, floor

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.order.mixture import apportion

OFFSETS = st.floats(0, 1, exclude_max=True)


@st.composite
def apportionments(draw):
    """Draw a total, weights and limits for which `apportion` has a solution."""
    weights = draw(st.lists(st.floats(0, 1e6) | st.sampled_from([0.0, 1e-9, 1.0]), min_size=1, max_size=9))
    assume(any(weights))
    limits = draw(st.lists(st.integers(0, 200), min_size=len(weights), max_size=len(weights)))
    capacity = sum(limit for limit, w in zip(limits, weights, strict=True) if w)
    return draw(st.integers(0, capacity)), weights, limits


def exact_parts(total: int, weights: list[float], limits: list[int]) -> list[Fraction]:
    """Split `total` exactly in proportion to the weights; an excess over a part's limit goes to the other parts."""
    parts = [Fraction(0)] * len(weights)
    while total:
        fill_level = Fraction(total) / sum(Fraction(w) for w, p, m in zip(weights, parts, limits, strict=True) if p < m)
        full_indices = [
            i for i, w in enumerate(weights) if parts[i] < limits[i] and fill_level * Fraction(w) >= limits[i]
        ]
        if not full_indices:
            return [fill_level * Fraction(w) if p < m else p for w, p, m in zip(weights, parts, limits, strict=True)]
        for i in full_indices:
            parts[i] = Fraction(limits[i])
            total -= limits[i]
    return parts


@settings(max_examples=300)
@given(apportionments(), OFFSETS)
def test_apportion_rounds_the_exact_parts_within_limits(problem, offset):
    total, _, limits = problem
    parts, expected_parts = apportion(*problem, offset), exact_parts(*problem)
    assert sum(parts) == total
    for count, expected_part, limit in zip(parts, expected_parts, limits, strict=True):
        assert count in (floor(expected_part), ceil(expected_part))
        assert count <= limit


@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=2000), OFFSETS)
def test_apportion_keeps_small_shares_of_a_large_total(weights, offset):
    total = 2**50
    parts = np.array(apportion(total, weights, [total] * len(weights), offset), object)
    assert sum(parts) == total
    expected_parts = [Fraction(w) / sum(map(Fraction, weights)) * total for w in weights]
    assert all(abs(f - e) < 1 for f, e in zip(parts, expected_parts, strict=True))
    assert min(parts) > 0


def test_apportion_gives_the_exact_parts_on_average():
    weights = [0.05, 0.35, 3.3, 6.3]
    offsets = (np.arange(1000) + 0.5) / 1000
    mean_parts = np.mean([apportion(10, weights, [10] * 4, offset) for offset in offsets], axis=0)
    assert np.abs(mean_parts - weights).max() < 0.01
