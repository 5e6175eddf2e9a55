"""Tests of kernel `padded` against kernel `reference`, and of a row's independence of all other rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import GeluSubln, Swiglu, run_experts
from tests.kernels.problems import make_problem


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20), n=st.integers(0, 40), e=st.integers(1, 9), data=st.data(),
    function=st.sampled_from([Swiglu(), GeluSubln()]),
)  # fmt: skip
def test_padded_matches_reference(seed, n, e, data, function):
    k = data.draw(st.integers(1, e), label="k")
    *routes, weights = make_problem(seed, n, d=8, f=6, e=e, k=k, dtype=torch.float64, function=function)
    with torch.no_grad():
        actual, expected = (run_experts(kernel, *routes, weights) for kernel in ("padded", "reference"))
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("function", [Swiglu(), GeluSubln()])
@torch.no_grad()
def test_row_result_is_independent_of_other_rows(function, threads, dtype):
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, expert, gate, weights = make_problem(3, 60, d=96, f=200, e=6, k=2, dtype=dtype, function=function)
        all_outputs = run_experts("padded", x, expert, gate, weights)
        for rows in ([0], [59], [3, 4, 5], [*range(10, 27)]):
            outputs = run_experts("padded", x[rows], expert[rows], gate[rows], weights)
            assert torch.equal(outputs, all_outputs[rows])
    finally:
        torch.set_num_threads(previous_threads)
