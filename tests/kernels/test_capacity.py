"""Tests of kernel `capacity` (GShard's static routing by masks) against kernels with gates of 0 for dropped routes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import run_experts
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.loss import token_losses
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.model.router.top_k import capacity_mask
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.kernels.problems import make_problem


def outputs_and_gradients(backend, x, expert, gate, weights, expert_capacity=None):
    """Return a backend's outputs, and the gradients of rows and each weight for a weighted sum of the outputs.

    Gates are left out: `reference` also has gradients for gates of 0, whose routes `capacity` does not compute.
    """
    y = run_experts(backend, x, expert, gate, weights, expert_capacity)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, *torch.autograd.grad((y * direction).sum(), [x, *weights.stacked], materialize_grads=True)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**20), n=st.integers(0, 30), e=st.integers(1, 6), data=st.data())
def test_capacity_kernel_matches_reference_for_kept_routes(seed, n, e, data):
    k = data.draw(st.integers(1, e), label="k")
    x, expert, gate, weights = make_problem(seed, n, d=6, f=5, e=e, k=k)
    factor = data.draw(st.sampled_from([0.3, 1.0, 2.0]), label="factor")
    expert_capacity = MoESpec(experts=e, top_k=k, d_expert=5, capacity_factor=factor).expert_capacity(n)
    is_kept = capacity_mask(expert, torch.ones_like(expert, dtype=torch.bool), e, expert_capacity)
    gate = (gate.detach() * is_kept).requires_grad_()
    results = outputs_and_gradients("capacity", x, expert, gate, weights, expert_capacity)
    for a, b in zip(results, outputs_and_gradients("reference", x, expert, gate, weights), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_second_choices_are_dropped_before_first_choices():
    """The kernel itself drops routes beyond 2 slots per expert, here without a router that dropped them before.

    The first choices of rows 1 and 2 fill expert 0, so the second choice of row 0 is dropped.
    """
    x, _, _, weights = make_problem(0, n=3, d=4, f=3, e=2, k=2)
    expert = torch.tensor([[1, 0], [0, 1], [0, 1]])
    gate = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]], dtype=torch.float64)
    output = run_experts("capacity", x, expert, gate, weights, 2)
    # Expert 0 keeps the first choices of rows 1 and 2. Expert 1 keeps the first choice of row 0 and the second choice
    # of row 1.
    is_kept = torch.tensor([[1, 0], [1, 1], [1, 0]], dtype=torch.float64)
    torch.testing.assert_close(output, run_experts("reference", x, expert, gate * is_kept, weights))


def build_model(kernel, **fields):
    """Return a float64 decoder that drops routes at capacity factor 0.5; `fields` are keys of MoESpec, or `dropout`."""
    moe = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 6, "every": 1, "capacity_factor": 0.5, **fields}
    shape = {"vocab_size": 20, "d_model": 16, "layers": 2, "attention_heads": 2}
    dropout = {"dropout": fields.pop("dropout", 0.0)}
    moe.pop("dropout", None)
    model = Decoder(ModelSpec(**shape, **dropout, moe=MoESpec(**moe, kernel=kernel)))
    init_weights(model, 0)
    return model.double()


@pytest.mark.parametrize("fields", [{}, {"dropout": 0.2}, {"second_expert": "random", "normalize_gates": True}])
def test_capacity_kernel_trains_like_grouped_kernel_with_dropped_routes(fields):
    token = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for kernel in ("capacity", "grouped"):
        model = build_model(kernel, **fields)
        output = model(token[:, :-1], noise=Noise(0, 0))
        assert sum(int(r.dropped_routes) for r in output.routing) > 0
        token_losses(output.logits_BTV, token[:, 1:]).mean().backward()
        results.append([output.logits_BTV.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_serving_drops_no_routes():
    token = torch.randint(20, (1, 12))
    masked_output, grouped_output = (build_model(kernel).eval()(token) for kernel in ("capacity", "grouped"))
    torch.testing.assert_close(masked_output.logits_BTV, grouped_output.logits_BTV)
    assert all(int(r.dropped_routes) == 0 for r in masked_output.routing)
