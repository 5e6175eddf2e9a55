"""Tests of the fused router against the model's router in float64."""

import importlib.util

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mhmoe_ray.model.router import Router
from mhmoe_ray.spec import MoESpec
from tests.kernels.triton.problems import DEVICE

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.long,
    # The tests also run without a GPU, in Triton's interpreter.
    pytest.mark.gpu,
]


class Logits(torch.nn.Module):
    """Module in place of a router's scores that returns its input, so that a test gives the router its logits."""

    def forward(self, x_NE):
        return x_NE

    def balance_probabilities(self, x_NE, probability_NE):
        return probability_NE


def assert_routing_is_that_of_the_model(logits, moe):
    """Compare choices, gates, counts, losses and the gradient of the logits with the model's router in float64."""
    from mhmoe_kernels.triton import fused_routing

    routing = fused_routing(
        logits,
        moe.top_k,
        moe.expert_capacity(len(logits)),
        normalized=moe.normalize_gates,
        scale=moe.gate_scale,
        counts_first=moe.balance_choices == "first",
    )
    router = Router(8, moe)
    router.scores = Logits()
    wide_logits = logits.detach().double().requires_grad_()
    expected = router(wide_logits)
    assert torch.equal(routing.expert_NK, expected.expert_NK)
    assert torch.equal(routing.count_E, expected.count_E)
    assert torch.equal(routing.dropped_routes, expected.dropped_routes)
    assert torch.equal(routing.gate_NK == 0, expected.gate_NK == 0)
    direction = torch.arange(routing.gate_NK.numel(), dtype=torch.float64, device=DEVICE).sin().view_as(routing.gate_NK)

    def loss(result):
        return (result.gate_NK * direction).sum() + 3 * result.balance_loss + 0.1 * result.z_loss

    for name in ("gate_NK", "balance_loss", "z_loss"):
        torch.testing.assert_close(getattr(routing, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-6)
    [gradient] = torch.autograd.grad(loss(routing), logits)
    [expected_gradient] = torch.autograd.grad(loss(expected), wide_logits)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


def random_logits(seed, rows, experts):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, experts, generator=generator)).to(DEVICE).requires_grad_()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**20), rows=st.integers(1, 300), experts=st.sampled_from([2, 5, 16, 40]), k=st.integers(1, 5),
    normalized=st.booleans(), scale=st.sampled_from([1.0, 2.5]), choices=st.sampled_from(["first", "all"]),
    capacity_factor=st.sampled_from([None, 0.5, 1.25]),
)  # fmt: skip
def test_routing_is_that_of_the_model(seed, rows, experts, k, normalized, scale, choices, capacity_factor):
    # The spec refuses normalised gates, and a balance loss over all choices, if a row has a single choice.
    k = min(k, experts)
    normalized, choices = (normalized, choices) if k > 1 else (False, "first")
    moe = MoESpec(
        heads=1, experts=experts, top_k=k, d_expert=8, normalize_gates=normalized, gate_scale=scale,
        balance_choices=choices, capacity_factor=capacity_factor,
    )  # fmt: skip
    assert_routing_is_that_of_the_model(random_logits(seed, rows, experts), moe)


@settings(deadline=None, max_examples=20)
@example(seed=0, rows=2500, width=40, experts=70, dtype=torch.bfloat16)  # sums over rows in several parts
@given(
    seed=st.integers(0, 2**20), rows=st.integers(1, 300), width=st.sampled_from([1, 24, 32, 300]),
    experts=st.integers(1, 140), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_logits_and_their_gradients_are_as_exact_as_in_float32(seed, rows, width, experts, dtype):
    # On a GPU, products of tf32 would have errors of 3e-4. Triton's interpreter computes them in float32.
    from mhmoe_kernels.triton import fused_logits

    generator = torch.Generator().manual_seed(seed)
    x_ND, weight_ED, direction_NE = (
        torch.randn(size, generator=generator) for size in ((rows, width), (experts, width), (rows, experts))
    )
    x_ND, weight_ED, direction_NE = x_ND.to(DEVICE, dtype), weight_ED.to(DEVICE), direction_NE.to(DEVICE)
    leaves = [x_ND.requires_grad_(), weight_ED.requires_grad_()]
    logits_NE = fused_logits(*leaves)
    results = [logits_NE, *torch.autograd.grad(logits_NE, leaves, direction_NE)]
    wide_x_ND, wide_weight_ED, wide_direction_NE = (t.detach().double() for t in (x_ND, weight_ED, direction_NE))
    expected = [
        wide_x_ND @ wide_weight_ED.T,
        (wide_direction_NE @ wide_weight_ED).to(dtype),
        wide_direction_NE.T @ wide_x_ND,
    ]
    assert [t.dtype for t in results] == [torch.float32, dtype, torch.float32]
    for result, expected_result in zip(results, expected, strict=True):
        # The interpreter truncates float32 to bfloat16 where a GPU rounds to nearest.
        limit = 2e-6 if result.dtype == torch.float32 else 8e-3
        assert (result.double() - expected_result).norm().item() < limit * expected_result.double().norm().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_many_rows_and_experts_are_routed_alike(capacity_factor):
    moe = MoESpec(heads=1, experts=296, top_k=8, d_expert=8, capacity_factor=capacity_factor)
    assert_routing_is_that_of_the_model(random_logits(1, 100_001, 296), moe)


# Triton's interpreter computes with numpy, which warns of NaN and infinity.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("experts", [5, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_choose_experts_that_exist(experts, value):
    """A step whose numbers are not finite is skipped later, but until then all indices must be valid."""
    from mhmoe_kernels.triton import fused_routing
    from mhmoe_kernels.triton.operators import SortedRoutes, sort_routes

    logits = random_logits(2, 20, experts).detach()
    logits[3], logits[7, 1:] = value, value
    routing = fused_routing(logits, 3, None, normalized=True, scale=1.0, counts_first=True)
    assert int(routing.expert_NK.min()) >= 0
    assert int(routing.expert_NK.max()) < experts
    assert all(len(set(row)) == 3 for row in routing.expert_NK.tolist())
    assert not routing.gate_NK[3].isfinite().all()
    routes = SortedRoutes(*sort_routes(routing.expert_NK, experts, 16))
    assert sorted(routes.route_R.tolist()) == list(range(60))
