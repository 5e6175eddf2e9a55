"""Tests of the fused router against the model's router in float64."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.model.router import Router
from mhmoe_ray.spec import MoESpec
from tests.kernels.triton.problems import DEVICE

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.long,
]


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**20), rows=st.integers(1, 300), experts=st.sampled_from([2, 5, 16, 40]), k=st.integers(1, 2),
    normalized=st.booleans(), scale=st.sampled_from([1.0, 2.5]), choices=st.sampled_from(["first", "all"]),
    capacity_factor=st.sampled_from([None, 0.5, 1.25]),
)  # fmt: skip
def test_routing_is_that_of_the_model(seed, rows, experts, k, normalized, scale, choices, capacity_factor):
    from mhmoe_kernels.triton import fused_routing

    # With a single choice there are no others, and the spec says so.
    normalized, choices = (normalized, choices) if k > 1 else (False, "first")
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, experts, generator=generator)).to(DEVICE).requires_grad_()
    moe = MoESpec(
        heads=1, experts=experts, top_k=k, d_expert=8, normalize_gates=normalized, gate_scale=scale,
        balance_choices=choices, capacity_factor=capacity_factor,
    )  # fmt: skip
    routing = fused_routing(
        logits, k, moe.expert_capacity(rows), normalized=normalized, scale=scale, counts_first=choices == "first"
    )

    class Logits(torch.nn.Module):
        def forward(self, x_NE):
            return x_NE

        def balance_probabilities(self, x_NE, probability_NE):
            return probability_NE

    router = Router(8, moe)
    router.scores = Logits()
    wide_logits = logits.detach().double().requires_grad_()
    expected = router(wide_logits)
    assert torch.equal(routing.expert_NK, expected.expert_NK)
    assert torch.equal(routing.count_E, expected.count_E)
    assert torch.equal(routing.dropped_routes, expected.dropped_routes)
    assert torch.equal(routing.gate_NK == 0, expected.gate_NK == 0)
    direction = torch.arange(rows * k, dtype=torch.float64, device=DEVICE).sin().view(rows, k)

    def loss(result):
        return (result.gate_NK * direction).sum() + 3 * result.balance_loss + 0.1 * result.z_loss

    for name in ("gate_NK", "balance_loss", "z_loss"):
        torch.testing.assert_close(getattr(routing, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-6)
    [gradient] = torch.autograd.grad(loss(routing), logits)
    [expected_gradient] = torch.autograd.grad(loss(expected), wide_logits)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)
