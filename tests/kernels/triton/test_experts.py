"""Tests of the Triton experts, fused and as grouped products, against `reference` in float64."""

import importlib.util
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mhmoe_kernels import ExpertWeights, Swiglu, run_sorted_experts
from mhmoe_kernels.triton import run_fused, run_grouped, unavailable_reason
from tests.kernels.triton.problems import DEVICE, KINDS, TOLERANCE, largest_error, make_problem, outputs_and_gradients

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.long,
]
every_implementation = pytest.mark.parametrize("run", [run_fused, run_grouped], ids=["fused", "grouped"])


@every_implementation
@settings(deadline=None, max_examples=12)
@example(kind="gelu", seed=0, n=0, d=24, f=33, e=3, data=None)
@example(kind="swiglu", seed=0, n=0, d=24, f=33, e=3, data=None)
@given(
    kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 2**20), n=st.integers(0, 50),
    d=st.sampled_from([8, 16, 24, 48]), f=st.sampled_from([5, 24, 33, 40]), e=st.integers(1, 5), data=st.data(),
)  # fmt: skip
def test_float32_matches_float64_reference(run, kind, seed, n, d, f, e, data):
    n_used = data.draw(st.integers(1, e), label="experts with rows") if data else e
    k = data.draw(st.integers(1, min(n_used, 3)), label="k") if data else 1
    assert largest_error(run, *make_problem(kind, seed, n, d, f, e, k, n_used=n_used)) < TOLERANCE[torch.float32]


@every_implementation
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d", "f"), [(24, 40), (48, 33)])
def test_bfloat16_is_near_float64_reference(run, kind, d, f):
    error = largest_error(run, *make_problem(kind, 7, n=40, d=d, f=f, e=3, k=2, dtype=torch.bfloat16))
    assert error < TOLERANCE[torch.bfloat16]


@every_implementation
def test_norm_of_shifted_hidden_units_is_precise(run):
    """The hidden units have a mean of about 200 standard deviations, where a variance computed as E[g^2] - E[g]^2 would
    lose 4 of 7 digits and cause an error of 5e-3.

    The remaining error comes from sums of products.
    """
    x, expert, gate, weights = make_problem("gelu", 3, n=20, d=16, f=40, e=2, k=1)
    fc1, bias, *other_weights = weights.stacked
    shifted_weights = ExpertWeights(weights.function, (fc1, bias + 200, *other_weights))
    assert largest_error(run, x, expert, gate, shifted_weights) < 20 * TOLERANCE[torch.float32]


@every_implementation
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_bitwise_reproducible(run, kind):
    args = make_problem(kind, 5, n=40, d=24, f=40, e=3, k=2)
    first_results, second_results = outputs_and_gradients(run, *args), outputs_and_gradients(run, *args)
    assert all(torch.equal(a, b) for a, b in zip(first_results, second_results, strict=True))


@pytest.mark.parametrize("recompute", [0.0, 0.4])
def test_products_of_torch_are_near_float64_reference(recompute):
    x, expert, gate, weights = make_problem("swiglu", 7, n=40, d=24, f=40, e=3, k=2, dtype=torch.bfloat16)
    run = partial(run_grouped, use_torch=True)
    error = largest_error(run, x, expert, gate, weights._replace(recompute=recompute))
    assert error < TOLERANCE[torch.bfloat16]


@every_implementation
def test_frozen_weights_get_no_gradient(run):
    x, expert, gate, weights = make_problem("swiglu", 5, n=9, d=8, f=5, e=3, k=2)
    run(x.requires_grad_(), expert, gate, weights).sum().backward()
    assert x.grad is not None
    assert all(w.grad is None for w in weights.stacked)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [0.4, 1.0])
def test_recomputed_rows_give_the_same_bits(kind, recompute):
    """Grouped products give a row the same bits in whatever tile it is, so the share of recomputed rows changes
    nothing."""
    x, expert, gate, weights = make_problem(kind, 6, n=30, d=16, f=24, e=3, k=2)
    kept_results = outputs_and_gradients(run_grouped, x, expert, gate, weights)
    recomputed_results = outputs_and_gradients(run_grouped, x, expert, gate, weights._replace(recompute=recompute))
    assert all(torch.equal(a, b) for a, b in zip(kept_results, recomputed_results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_sorted_rows_get_the_output_of_their_expert(kind, recompute):
    x, _, _, weights = make_problem(kind, 8, n=11, d=16, f=24, e=4, k=1)
    counts, weights = [5, 0, 4, 2], weights._replace(recompute=recompute)
    expert_N1 = torch.arange(4).repeat_interleave(torch.tensor(counts))[:, None].to(DEVICE)
    gate_N1 = torch.ones(11, 1, device=DEVICE)

    def run_sorted(x, expert, gate, weights):
        return run_sorted_experts("grouped_gemm", x, counts, weights) * gate

    assert largest_error(run_sorted, x, expert_N1, gate_N1, weights) < TOLERANCE[torch.float32]


@pytest.mark.gpu
def test_sorted_rows_may_be_none():
    x, _, _, weights = make_problem("swiglu", 8, n=0, d=16, f=24, e=4, k=1)
    stacked = tuple(w.requires_grad_() for w in weights.stacked)
    y = run_sorted_experts("grouped_gemm", x, [0, 0, 0, 0], weights._replace(stacked=stacked))
    gradients = torch.autograd.grad(y.sum(), stacked)
    assert y.shape == x.shape
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@every_implementation
def test_activation_checkpoints_give_the_same_gradients(run):
    from torch.utils.checkpoint import checkpoint

    args = make_problem("swiglu", 9, n=12, d=16, f=24, e=3, k=2)
    expected = outputs_and_gradients(run, *args)
    results = outputs_and_gradients(partial(checkpoint, run, use_reentrant=False), *args)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@every_implementation
@pytest.mark.parametrize("kind", KINDS)
def test_backward_can_be_split_into_inputs_and_weights(run, kind):
    """A pipeline schedule computes gradients of inputs first and those of weights later, from the same graph."""
    x, expert, gate, weights = make_problem(kind, 10, n=12, d=16, f=24, e=3, k=2)
    expected = outputs_and_gradients(run, x, expert, gate, weights)
    x, gate, *stacked = (t.detach().clone().requires_grad_() for t in (x, gate, *weights.stacked))
    y = run(x, expert, gate, weights._replace(stacked=tuple(stacked)))
    direction = torch.arange(y.numel(), device=y.device, dtype=torch.float64).sin().view_as(y).to(y.dtype)
    of_inputs = torch.autograd.grad(y, [x, gate], direction, retain_graph=True)
    of_weights = torch.autograd.grad(y, stacked, direction)
    assert all(torch.equal(a, b) for a, b in zip((*of_inputs, *of_weights), expected[1:], strict=True))


@every_implementation
def test_unsupported_problem_or_machine_is_refused(run, monkeypatch):
    x, expert, gate, weights = make_problem("swiglu", 0, n=3, d=8, f=5, e=2, k=1)
    with pytest.raises(TypeError, match="float64"):
        run(x.double(), expert, gate, ExpertWeights(Swiglu(), tuple(w.double() for w in weights.stacked)))
    assert unavailable_reason(DEVICE) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in unavailable_reason(torch.device("cpu"))
    cuda = torch.device("cuda")
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert unavailable_reason(cuda) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "neither gcc nor clang" in unavailable_reason(cuda)
    with pytest.raises(RuntimeError, match="this is cpu"):
        run(x.cpu(), expert.cpu(), gate.cpu(), weights)


def test_import_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mhmoe_kernels.triton as t\n"
        "print(t.unavailable_reason(torch.device('cpu')))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "triton is not installed: pip install triton\n"


@every_implementation
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "f"), [(96, 384), (192, 768), (192, 3072), (384, 1000), (768, 512)])
def test_model_sizes_match_float64_reference(run, kind, dtype, d, f):
    error = largest_error(run, *make_problem(kind, 1, n=3000, d=d, f=f, e=8, k=2, dtype=dtype, n_used=7))
    # The limit for float32 is larger than in TOLERANCE, because the error of sums over thousands of rows and hidden
    # units grows with the square root of their number.
    assert error < {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}[dtype]
