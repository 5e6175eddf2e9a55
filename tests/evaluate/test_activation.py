"""Routing figures of cases whose answer is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.evaluate import activation
from mhmoe_ray.evaluate.request import RoutingCounts


def counts_of(routes, heads=1):
    """Return the counts of one layer with these numbers of routes to its experts, where each token has a single
    expert."""
    tokens = sum(routes)
    return RoutingCounts(
        tokens=tokens,
        counts=[list(routes)],
        tokens_of=[list(routes)],
        distinct=[[0, tokens]],
        agreement=[[[tokens] * heads for _ in range(heads)]],
        first_weight=[0.5 * tokens * heads],
    )


def test_uniform_routing_is_1_everywhere_and_collapse_0():
    uniform, collapsed = counts_of([25] * 4), counts_of([100, 0, 0, 0])
    assert activation.load(uniform.counts).tolist() == [[1, 1, 1, 1]]
    assert activation.entropy(uniform) == pytest.approx([1])
    assert activation.entropy(collapsed) == pytest.approx([0])
    assert activation.activated(uniform) == [1 if t < 0.25 else 0 for t in activation.THRESHOLDS]
    assert activation.activated(collapsed) == [0.25] * len(activation.THRESHOLDS)
    assert activation.activated_relative(uniform.counts) == [1 if t < 1 else 0 for t in activation.RELATIVE]
    assert activation.specialisation(collapsed, uniform) == pytest.approx(0.75)
    assert activation.specialisation(uniform, uniform) == 0


def test_heads():
    assert activation.mean_agreement(counts_of([1, 1])) is None
    assert activation.mean_agreement(counts_of([1, 1], heads=3)) == pytest.approx([1])
    assert activation.first_weight(counts_of([3, 1], heads=2)) == pytest.approx([0.5])


@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), min_size=1, max_size=5))
def test_texts_joined_count_as_one(parts):
    whole = activation.joined([counts_of(routes) for routes in parts])
    assert whole == counts_of(np.sum(parts, 0).tolist())
    shares = activation.activated(whole)
    assert shares == sorted(shares, reverse=True)


def test_there_may_be_any_number_of_texts():
    assert activation.joined([counts_of([1, 2])] * 2000) == counts_of([2000, 4000])
