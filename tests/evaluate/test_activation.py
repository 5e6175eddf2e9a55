"""Tests of the statistics on a model's use of its experts, against cases with known answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.evaluate import activation
from mhmoe_ray.evaluate.request import RoutingCounts


def make_counts(routes, heads=1):
    """Return the counts of one layer whose expert i gets `routes[i]` tokens; all heads of a token choose alike."""
    tokens = sum(routes)
    return RoutingCounts(
        tokens=tokens,
        counts=[list(routes)],
        tokens_of=[list(routes)],
        distinct=[[0, tokens]],
        agreement=[[[tokens] * heads for _ in range(heads)]],
        first_weight=[0.5 * tokens * heads],
    )


def test_figures_of_uniform_and_collapsed_routing():
    uniform, collapsed = make_counts([25] * 4), make_counts([100, 0, 0, 0])
    assert activation.expert_loads(uniform.counts).tolist() == [[1, 1, 1, 1]]
    assert activation.load_entropy(uniform) == pytest.approx([1])
    assert activation.load_entropy(collapsed) == pytest.approx([0])
    assert activation.activated_shares(uniform) == [1 if t < 0.25 else 0 for t in activation.THRESHOLDS]
    assert activation.activated_shares(collapsed) == [0.25] * len(activation.THRESHOLDS)
    assert activation.relative_activated_shares(uniform.counts) == [
        1 if t < 1 else 0 for t in activation.RELATIVE_THRESHOLDS
    ]
    assert activation.specialisation(collapsed, uniform) == pytest.approx(0.75)
    assert activation.specialisation(uniform, uniform) == 0


def test_figures_of_several_heads():
    assert activation.mean_head_agreement(make_counts([1, 1])) is None
    assert activation.mean_head_agreement(make_counts([1, 1], heads=3)) == pytest.approx([1])
    assert activation.first_choice_weight(make_counts([3, 1], heads=2)) == pytest.approx([0.5])


@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), min_size=1, max_size=5))
def test_sum_counts_equals_the_counts_of_all_texts(routes_by_text):
    total_counts = activation.sum_counts([make_counts(routes) for routes in routes_by_text])
    assert total_counts == make_counts(np.sum(routes_by_text, 0).tolist())
    shares = activation.activated_shares(total_counts)
    assert shares == sorted(shares, reverse=True)


def test_sum_counts_takes_any_number_of_texts():
    assert activation.sum_counts([make_counts([1, 2])] * 2000) == make_counts([2000, 4000])


def test_sum_counts_takes_texts_of_tasks_with_different_k():
    """One task of a vision model may choose two experts and another three, so their histograms differ in length."""
    narrow, wide = make_counts([10, 0, 10, 0]), make_counts([30, 30, 0, 0])
    narrow = narrow.model_copy(update={"tokens": 10, "distinct": [[0, 4, 6]]})
    wide = wide.model_copy(update={"tokens": 20, "distinct": [[0, 5, 10, 5]]})
    total_counts = activation.sum_counts([narrow, wide])
    assert total_counts.distinct == [[0, 9, 16, 5]]
    assert activation.mean_distinct_experts(total_counts) == pytest.approx([(9 + 2 * 16 + 3 * 5) / 30])
    assert activation.routes_per_token(wide) == 3
    assert activation.routes_per_token(total_counts) == pytest.approx((10 * 2 + 20 * 3) / 30)
