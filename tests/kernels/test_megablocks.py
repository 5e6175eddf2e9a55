"""The real megablocks against `reference`: its kernels are interpreted on a CPU, and run as compiled on CUDA.

On a CPU, `tests/kernels/megablocks_ops.py` stands for its compiled extension, and is compared with definitions here.
"""

import sys
from importlib.util import find_spec
from itertools import accumulate, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import ExpertWeights, GeluSubln, Swiglu, run_experts
from mhmoe_kernels.megablocks import _missing, can_group, why_not
from tests.kernels import megablocks_ops
from tests.kernels.problems import outputs_and_gradients, problem

pytestmark = pytest.mark.long

installed = pytest.mark.skipif(
    None in map(find_spec, ("megablocks", "stk", "triton")),
    reason="megablocks, stanford-stk or triton is not installed",
)


@pytest.fixture(scope="module")
def interpreted():
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here; the tests marked gpu run instead")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "megablocks_ops", megablocks_ops)
        assert _missing() is None
        from megablocks.backend import kernels

        for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
            # Several would be timed on the GPU.
            patch.setattr(kernel, "configs", kernel.configs[:1])
        yield


def agree(ours, oracle, tolerance):
    for a, b in zip(
        outputs_and_gradients("megablocks", *ours), outputs_and_gradients("reference", *oracle), strict=True
    ):
        assert (a.double() - b.double()).norm() <= tolerance * (b.double().norm() + 1e-3)


@installed
@pytest.mark.parametrize("function", [Swiglu(), GeluSubln(), GeluSubln(0.1)])
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20), n=st.integers(0, 12), e=st.integers(1, 9), data=st.data(),
    # The first is looped over, the second goes through grouped_mm, and float64 is looped over always.
    width=st.sampled_from([(6, 5), (8, 12)]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_it_agrees_with_reference_with_empty_experts_among_them(interpreted, function, seed, n, e, data, width, dtype):
    only = data.draw(st.integers(1, e), label="experts with rows")
    k = data.draw(st.integers(1, min(only, 4)), label="k")
    args = problem(seed, n, *width, e, k, dtype, only, function)
    agree(args, args, 1e-4)


@installed
@pytest.mark.parametrize("function", [Swiglu(), GeluSubln()])
@pytest.mark.parametrize("d", [12, 16], ids=["loop", "grouped_mm"])
def test_bfloat16_is_near_float32_and_may_have_float32_gates(interpreted, function, d):
    x, expert, gate, weights = problem(3, n=24, d=d, f=32, e=5, k=2, function=function, dtype=torch.bfloat16, only=4)
    gate = gate.float().detach().requires_grad_()
    assert can_group(weights) == (d == 16)
    exact = [t.float().detach().requires_grad_() for t in (x, *weights.stacked)]
    oracle = (exact[0], expert, gate, ExpertWeights(function, tuple(exact[1:])))
    agree((x, expert, gate, weights), oracle, 0.02)
    dtypes = [t.dtype for t in outputs_and_gradients("megablocks", x, expert, gate, weights)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32] + [torch.bfloat16] * len(weights.stacked)


@installed
def test_autocast_changes_nothing(interpreted):
    args = problem(4, n=8, d=16, f=16, e=3, k=2, dtype=torch.float32)
    plain = run_experts("megablocks", *args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run_experts("megablocks", *args), plain)


@installed
def test_rows_and_gates_need_not_be_contiguous(interpreted):
    x, expert, gate, weights = problem(5, n=8, d=8, f=8, e=3, k=2, dtype=torch.float32)
    strided = x.detach().T.contiguous().T.requires_grad_(), expert.T.contiguous().T, gate.detach().T.contiguous().T
    agree((*strided[:2], strided[2].requires_grad_(), weights), (x, expert, gate, weights), 1e-4)


def test_more_than_its_indices_can_hold_is_refused():
    x, expert = torch.zeros(1, 1).expand(2**20, 2**10), torch.zeros(1, 1, dtype=torch.int64).expand(2**20, 2)
    with pytest.raises(ValueError, match="1048576 rows x 2 experts x width 1024"):
        run_experts("megablocks", x, expert, expert.float(), ExpertWeights(Swiglu(), (torch.zeros(4, 1, 1),)))


@settings(max_examples=50)
@given(x=st.lists(st.integers(0, 63), min_size=1, max_size=30), end_bit=st.integers(1, 6))
def test_the_extensions_stand_in_does_what_its_docstrings_say(x, end_bit):
    vector = torch.tensor(x, dtype=torch.int32)
    values, places, sums = torch.empty_like(vector), torch.empty_like(vector), torch.empty_like(vector)[None]
    megablocks_ops.sort(vector, end_bit, values, places)
    order = sorted(range(len(x)), key=lambda i: x[i] % 2**end_bit)
    assert (values.tolist(), places.tolist()) == ([x[i] for i in order], order)
    megablocks_ops.inclusive_cumsum(vector[None], 1, sums)
    assert sums.tolist() == [list(accumulate(x))]
    counts = megablocks_ops.histogram(vector, 64)
    assert (counts.dtype, counts.tolist()) == (torch.int32, [x.count(value) for value in range(64)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_it_agrees_with_reference():
    if reason := why_not(torch.device("cuda")):
        pytest.skip(reason)
    tolerances = {torch.float32: 1e-2, torch.bfloat16: 3e-2}
    widths, rows = [(64, 128), (96, 40), (12, 20)], [(0, 8), (1, 2), (1000, 5)]
    for function, dtype, (d, f), (n, only) in product([Swiglu(), GeluSubln()], tolerances, widths, rows):
        x, expert, gate, weights = problem(n, n, d, f, 8, 2, dtype, only, function, "cuda")
        exact = [t.double().detach().requires_grad_() for t in (x, gate, *weights.stacked)]
        oracle = exact[0], expert, exact[1], ExpertWeights(function, tuple(exact[2:]))
        agree((x, expert, gate, weights), oracle, tolerances[dtype])
