"""`padded` against `reference`, and the independence of a row's result from all other rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import GeluSubln, Swiglu, run_experts
from tests.kernels.problems import problem


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20), n=st.integers(0, 40), e=st.integers(1, 9), data=st.data(),
    function=st.sampled_from([Swiglu(), GeluSubln()]),
)  # fmt: skip
def test_padded_agrees_with_reference(seed, n, e, data, function):
    k = data.draw(st.integers(1, e), label="k")
    *routes, weights = problem(seed, n, d=8, f=6, e=e, k=k, dtype=torch.float64, function=function)
    with torch.no_grad():
        found, expected = (run_experts(kernel, *routes, weights) for kernel in ("padded", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("function", [Swiglu(), GeluSubln()])
@torch.no_grad()
def test_a_row_gives_the_same_bits_alone_and_among_others(function, threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, expert, gate, weights = problem(3, 60, d=96, f=200, e=6, k=2, dtype=dtype, function=function)
        together = run_experts("padded", x, expert, gate, weights)
        for rows in ([0], [59], [3, 4, 5], [*range(10, 27)]):
            alone = run_experts("padded", x[rows], expert[rows], gate[rows], weights)
            assert torch.equal(alone, together[rows])
    finally:
        torch.set_num_threads(before)
