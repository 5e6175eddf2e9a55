"""Tests of experts that a grouped GEMM computes, against the same experts computed one after another."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import GeluSubln, Swiglu
from mhmoe_kernels.grouped import run_sorted
from mhmoe_kernels.megablocks import can_group, run_grouped_gemm
from tests.kernels.problems import make_problem, with_gradients

KINDS = [Swiglu(), GeluSubln(), GeluSubln(0.1)]


def make_matmul(counts):
    """Return a function (rows, weights) that computes a grouped GEMM with `counts[e]` rows for expert e."""
    ends = torch.tensor(counts).cumsum(0).int()
    return lambda x_RI, w_EOI: F.grouped_mm(x_RI, w_EOI.transpose(-2, -1), offs=ends)


def run_both(x, counts, weights):
    """Return the outputs and gradients of the experts with a grouped GEMM, and those of kernel `grouped`."""
    return [
        with_gradients(y, [x, *weights.stacked])
        for y in (run_grouped_gemm(x, weights, make_matmul(counts)), run_sorted(x, torch.tensor(counts), weights))
    ]


@pytest.mark.parametrize("function", KINDS)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), counts=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
def test_grouped_gemm_matches_expert_loop(function, seed, counts):
    x, _, _, weights = make_problem(seed, sum(counts), 8, 12, len(counts), 1, torch.float32, function=function)
    for actual, expected in zip(*run_both(x, counts, weights), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


def test_bfloat16_vector_gradients_are_summed_in_float32():
    # Each gradient is a sum of 4000 ones. In bfloat16 the sum would stop growing at 256.
    x, _, _, weights = make_problem(0, 4000, 8, 8, 1, 1, torch.bfloat16, function=GeluSubln())
    run_grouped_gemm(x, weights, make_matmul([4000])).backward(torch.ones(4000, 8, dtype=torch.bfloat16))
    assert weights.stacked[-1].grad.tolist() == [[4000.0] * 8]


def test_unaligned_rows_cannot_be_grouped():
    """Rows of the weight matrices must be a multiple of 16 bytes long."""
    for function in KINDS:
        for width, dtype, is_aligned in (
            (4, torch.float32, True),
            (6, torch.float32, False),
            (4, torch.bfloat16, False),
        ):
            *_, weights = make_problem(0, 1, 8, width, 2, 1, dtype, function=function)
            assert can_group(weights) == is_aligned
