"""Static routing with GShard's masks: the same outputs as without masks for the routes that fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import run_experts
from mhmoe_ray.model.decoder import Decoder, token_losses
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.model.router import fits
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.kernels.problems import problem


def outputs_and_gradients(backend, x, expert, gate, weights, places=None):
    y = run_experts(backend, x, expert, gate, weights, places)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, *torch.autograd.grad((y * direction).sum(), [x, *weights.stacked], materialize_grads=True)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**20), n=st.integers(0, 30), e=st.integers(1, 6), data=st.data())
def test_masks_give_what_routes_that_fit_give(seed, n, e, data):
    k = data.draw(st.integers(1, e), label="k")
    x, expert, gate, weights = problem(seed, n, d=6, f=5, e=e, k=k)
    factor = data.draw(st.sampled_from([0.3, 1.0, 2.0]), label="factor")
    places = MoESpec(experts=e, top_k=k, d_expert=5, capacity_factor=factor).places(n)
    kept = fits(expert, torch.ones_like(expert, dtype=torch.bool), e, places)
    gate = (gate.detach() * kept).requires_grad_()
    ours = outputs_and_gradients("capacity", x, expert, gate, weights, places)
    for a, b in zip(ours, outputs_and_gradients("reference", x, expert, gate, weights), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_what_does_not_fit_is_dropped_first_choices_last():
    """The masks alone drop here, not a router: two rows whose first choice is expert 0 push out a second choice of
    it."""
    x, _, _, weights = problem(0, n=3, d=4, f=3, e=2, k=2)
    expert = torch.tensor([[1, 0], [0, 1], [0, 1]])
    gate = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]], dtype=torch.float64)
    found = run_experts("capacity", x, expert, gate, weights, 2)
    # Expert 0: rows 1 and 2. Expert 1: row 0 first, then row 1's second choice.
    kept = torch.tensor([[1, 0], [1, 1], [1, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, run_experts("reference", x, expert, gate * kept, weights))


def model_of(kernel, **fields):
    moe = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 6, "every": 1, "capacity_factor": 0.5, **fields}
    shape = {"vocab_size": 20, "d_model": 16, "layers": 2, "attention_heads": 2}
    dropout = {"dropout": fields.pop("dropout", 0.0)}
    moe.pop("dropout", None)
    model = Decoder(ModelSpec(**shape, **dropout, moe=MoESpec(**moe, kernel=kernel)))
    init_weights(model, 0)
    return model.double()


@pytest.mark.parametrize("fields", [{}, {"dropout": 0.2}, {"second_expert": "random", "normalize_gates": True}])
def test_a_model_with_masks_trains_like_one_that_drops_the_same_routes(fields):
    token = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for kernel in ("capacity", "grouped"):
        model = model_of(kernel, **fields)
        output = model(token[:, :-1], noise=Noise(0, 0))
        assert sum(int(r.dropped) for r in output.routing) > 0
        token_losses(output.logits_BTV, token[:, 1:]).mean().backward()
        found.append([output.logits_BTV.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_serving_drops_nothing_whatever_the_kernel():
    token = torch.randint(20, (1, 12))
    masks, loop = (model_of(kernel).eval()(token) for kernel in ("capacity", "grouped"))
    torch.testing.assert_close(masks.logits_BTV, loop.logits_BTV)
    assert all(int(r.dropped) == 0 for r in masks.routing)
