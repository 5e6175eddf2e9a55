"""Tests of the installed megablocks against `reference`: its kernels are interpreted on a CPU, and compiled on CUDA.

On a CPU, `tests/kernels/megablocks_ops.py` replaces its compiled extension; a test here checks this substitute.
"""

import sys
from importlib.util import find_spec
from itertools import accumulate, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import ExpertWeights, GeluSubln, Swiglu, run_experts
from mhmoe_kernels.megablocks import _missing_dependency, can_group, unavailable_reason
from tests.kernels import megablocks_ops
from tests.kernels.problems import make_problem, outputs_and_gradients

pytestmark = pytest.mark.long

needs_megablocks = pytest.mark.skipif(
    None in map(find_spec, ("megablocks", "stk", "triton")),
    reason="megablocks, stanford-stk or triton is not installed",
)


@pytest.fixture(scope="module")
def interpreted():
    """Let megablocks run on a CPU with the substitute of its extension; skip the test if there is a GPU."""
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here; the tests marked gpu run instead")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "megablocks_ops", megablocks_ops)
        assert _missing_dependency() is None
        from megablocks.backend import kernels

        for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
            # Keep one configuration of each kernel: Triton chooses between several by timing them on a GPU, and there
            # is none here.
            patch.setattr(kernel, "configs", kernel.configs[:1])
        yield


def assert_agree(inputs, reference_inputs, tolerance):
    """Assert that the outputs and gradients of megablocks differ from those of `reference` by at most `tolerance`,
    relative to their norm."""
    for a, b in zip(
        outputs_and_gradients("megablocks", *inputs), outputs_and_gradients("reference", *reference_inputs), strict=True
    ):
        assert (a.double() - b.double()).norm() <= tolerance * (b.double().norm() + 1e-3)


@needs_megablocks
@pytest.mark.parametrize("function", [Swiglu(), GeluSubln(), GeluSubln(0.1)])
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20), n=st.integers(0, 12), e=st.integers(1, 9), data=st.data(),
    # Widths of 6 and 5 use the loop over experts, and widths of 8 and 12 use grouped_mm. float64 always uses the loop.
    width=st.sampled_from([(6, 5), (8, 12)]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_matches_reference_with_empty_experts(interpreted, function, seed, n, e, data, width, dtype):
    n_used = data.draw(st.integers(1, e), label="experts with rows")
    k = data.draw(st.integers(1, min(n_used, 4)), label="k")
    args = make_problem(seed, n, *width, e, k, dtype, n_used, function)
    assert_agree(args, args, 1e-4)


@needs_megablocks
@pytest.mark.parametrize("function", [Swiglu(), GeluSubln()])
@pytest.mark.parametrize("d", [12, 16], ids=["loop", "grouped_mm"])
def test_bfloat16_with_float32_gates_is_near_float32(interpreted, function, d):
    x, expert, gate, weights = make_problem(
        3, n=24, d=d, f=32, e=5, k=2, function=function, dtype=torch.bfloat16, n_used=4
    )
    gate = gate.float().detach().requires_grad_()
    assert can_group(weights) == (d == 16)
    exact_tensors = [t.float().detach().requires_grad_() for t in (x, *weights.stacked)]
    reference_inputs = (exact_tensors[0], expert, gate, ExpertWeights(function, tuple(exact_tensors[1:])))
    assert_agree((x, expert, gate, weights), reference_inputs, 0.02)
    dtypes = [t.dtype for t in outputs_and_gradients("megablocks", x, expert, gate, weights)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32] + [torch.bfloat16] * len(weights.stacked)


@needs_megablocks
def test_autocast_changes_no_outputs(interpreted):
    args = make_problem(4, n=8, d=16, f=16, e=3, k=2, dtype=torch.float32)
    expected = run_experts("megablocks", *args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run_experts("megablocks", *args), expected)


@needs_megablocks
def test_strided_rows_and_gates_are_supported(interpreted):
    x, expert, gate, weights = make_problem(5, n=8, d=8, f=8, e=3, k=2, dtype=torch.float32)
    strided = x.detach().T.contiguous().T.requires_grad_(), expert.T.contiguous().T, gate.detach().T.contiguous().T
    assert_agree((*strided[:2], strided[2].requires_grad_(), weights), (x, expert, gate, weights), 1e-4)


def test_too_many_elements_for_32_bit_indices_are_refused():
    x, expert = torch.zeros(1, 1).expand(2**20, 2**10), torch.zeros(1, 1, dtype=torch.int64).expand(2**20, 2)
    with pytest.raises(ValueError, match="1048576 rows x 2 experts x width 1024"):
        run_experts("megablocks", x, expert, expert.float(), ExpertWeights(Swiglu(), (torch.zeros(4, 1, 1),)))


@settings(max_examples=50)
@given(x=st.lists(st.integers(0, 63), min_size=1, max_size=30), end_bit=st.integers(1, 6))
def test_extension_substitute_matches_definitions(x, end_bit):
    vector = torch.tensor(x, dtype=torch.int32)
    values, positions, sums = torch.empty_like(vector), torch.empty_like(vector), torch.empty_like(vector)[None]
    megablocks_ops.sort(vector, end_bit, values, positions)
    order = sorted(range(len(x)), key=lambda i: x[i] % 2**end_bit)
    assert (values.tolist(), positions.tolist()) == ([x[i] for i in order], order)
    megablocks_ops.inclusive_cumsum(vector[None], 1, sums)
    assert sums.tolist() == [list(accumulate(x))]
    counts = megablocks_ops.histogram(vector, 64)
    assert (counts.dtype, counts.tolist()) == (torch.int32, [x.count(value) for value in range(64)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_matches_reference_on_cuda():
    if reason := unavailable_reason(torch.device("cuda")):
        pytest.skip(reason)
    tolerances = {torch.float32: 1e-2, torch.bfloat16: 3e-2}
    widths, rows = [(64, 128), (96, 40), (12, 20)], [(0, 8), (1, 2), (1000, 5)]
    for function, dtype, (d, f), (n, n_used) in product([Swiglu(), GeluSubln()], tolerances, widths, rows):
        x, expert, gate, weights = make_problem(n, n, d, f, 8, 2, dtype, n_used, function, "cuda")
        exact_tensors = [t.double().detach().requires_grad_() for t in (x, gate, *weights.stacked)]
        reference_inputs = exact_tensors[0], expert, exact_tensors[1], ExpertWeights(function, tuple(exact_tensors[2:]))
        assert_agree((x, expert, gate, weights), reference_inputs, tolerances[dtype])
