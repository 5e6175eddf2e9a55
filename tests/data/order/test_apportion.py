from fractions import Fraction
from math import ceil, floor

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.order.mixture import apportion

OFFSETS = st.floats(0, 1, exclude_max=True)


@st.composite
def problems(draw):
    weights = draw(st.lists(st.floats(0, 1e6) | st.sampled_from([0.0, 1e-9, 1.0]), min_size=1, max_size=9))
    assume(any(weights))
    limits = draw(st.lists(st.integers(0, 200), min_size=len(weights), max_size=len(weights)))
    most = sum(limit for limit, w in zip(limits, weights, strict=True) if w)
    return draw(st.integers(0, most)), weights, limits


def poured(total: int, weights: list[float], limits: list[int]) -> list[Fraction]:
    """Return the exact parts: as vessels fill up one after another, the overflow goes to those that are not full."""
    parts = [Fraction(0)] * len(weights)
    while total:
        level = Fraction(total) / sum(Fraction(w) for w, p, m in zip(weights, parts, limits, strict=True) if p < m)
        over = [i for i, w in enumerate(weights) if parts[i] < limits[i] and level * Fraction(w) >= limits[i]]
        if not over:
            return [level * Fraction(w) if p < m else p for w, p, m in zip(weights, parts, limits, strict=True)]
        for i in over:
            parts[i] = Fraction(limits[i])
            total -= limits[i]
    return parts


@settings(max_examples=300)
@given(problems(), OFFSETS)
def test_parts_are_the_exact_ones_rounded_add_up_and_keep_their_limits(problem, offset):
    total, _, limits = problem
    found, exact = apportion(*problem, offset), poured(*problem)
    assert sum(found) == total
    for count, part, limit in zip(found, exact, limits, strict=True):
        assert count in (floor(part), ceil(part))
        assert count <= limit


@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=2000), OFFSETS)
def test_no_share_of_2_to_the_50_vanishes(weights, offset):
    whole = 2**50
    found = np.array(apportion(whole, weights, [whole] * len(weights), offset), object)
    assert sum(found) == whole
    exact = [Fraction(w) / sum(map(Fraction, weights)) * whole for w in weights]
    assert all(abs(f - e) < 1 for f, e in zip(found, exact, strict=True))
    assert min(found) > 0


def test_rounding_is_fair_on_average():
    weights = [0.05, 0.35, 3.3, 6.3]
    offsets = (np.arange(1000) + 0.5) / 1000
    found = np.mean([apportion(10, weights, [10] * 4, offset) for offset in offsets], axis=0)
    assert np.abs(found - weights).max() < 0.01
