"""Experts over a grouped GEMM against the same experts one by one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import GeluSubln, Swiglu
from mhmoe_kernels.grouped import run_sorted
from mhmoe_kernels.megablocks import can_group, run_grouped
from tests.kernels.problems import problem, with_gradients

KINDS = [Swiglu(), GeluSubln(), GeluSubln(0.1)]


def matmul_of(counts):
    """Return a grouped product for these numbers of rows of the experts."""
    ends = torch.tensor(counts).cumsum(0).int()
    return lambda x_RI, w_EOI: F.grouped_mm(x_RI, w_EOI.transpose(-2, -1), offs=ends)


def both(x, counts, weights):
    return [
        with_gradients(y, [x, *weights.stacked])
        for y in (run_grouped(x, weights, matmul_of(counts)), run_sorted(x, counts, weights))
    ]


@pytest.mark.parametrize("function", KINDS)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), counts=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
def test_all_at_once_agrees_with_one_by_one(function, seed, counts):
    x, _, _, weights = problem(seed, sum(counts), 8, 12, len(counts), 1, torch.float32, function=function)
    for ours, oracle in zip(*both(x, counts, weights), strict=True):
        torch.testing.assert_close(ours, oracle, atol=1e-3, rtol=1e-4)


def test_gradients_of_vectors_in_bfloat16_are_added_in_float32():
    # 4000 summands each: added in bfloat16, a sum stops growing at 256 times one of them.
    x, _, _, weights = problem(0, 4000, 8, 8, 1, 1, torch.bfloat16, function=GeluSubln())
    run_grouped(x, weights, matmul_of([4000])).backward(torch.ones(4000, 8, dtype=torch.bfloat16))
    assert weights.stacked[-1].grad.tolist() == [[4000.0] * 8]


def test_rows_that_are_not_aligned_cannot_be_grouped():
    for function in KINDS:
        for width, dtype, aligned in ((4, torch.float32, True), (6, torch.float32, False), (4, torch.bfloat16, False)):
            *_, weights = problem(0, 1, 8, width, 2, 1, dtype, function=function)
            assert can_group(weights) == aligned
