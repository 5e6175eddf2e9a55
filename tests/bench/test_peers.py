"""Other packages' layers compute the same as ours from the same weights."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_kernels import ExpertWeights, Swiglu, run_experts
from mhmoe_ray.bench.layers import Case, Shape, mixture
from mhmoe_ray.bench.peers import PEERS, installed, peer_layers, why_not

pytestmark = pytest.mark.long

SHAPE = Shape(tokens=40, d_model=32, experts=4, top_k=2, d_expert=48)
CPU = torch.device("cpu")
OF = {peer.name: peer for peer in PEERS}


def _made(name, ours):
    peer = OF[name]
    if why := why_not(peer, installed(peer.package)):
        pytest.skip(why)
    return peer.like(ours)


def _through(layer, x, weights):
    """Return the output, and the gradients of sum(y^2) with respect to the input and the given weights."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    gradients = torch.autograd.grad(y.square().sum(), [x, *weights])
    return y.detach(), *gradients


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("name", ["transformers eager", "transformers grouped_mm", "DeepSpeed dropless"])
def test_a_dropless_peer_gives_our_outputs_and_gradients(name, top_k):
    ours = mixture(SHAPE, SHAPE._replace(top_k=top_k).plain.model_copy(update={"normalize_gates": True}))
    peer = _made(name, ours)
    x = torch.randn(1, SHAPE.tokens, SHAPE.d_model, generator=torch.Generator().manual_seed(1))
    [router] = ours.router.parameters()
    of_peer = dict(peer.named_parameters())
    its_router = of_peer.get("gate.weight", of_peer.get("deepspeed_moe.gate.wg.weight"))
    expected = _through(ours, x, [router])
    for found, wanted in zip(_through(peer, x, [its_router]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_deepspeeds_capacity_drops_what_our_static_routing_drops():
    """DeepSpeed drops the same routes as our static routing at two choices a token; at one or at more it drops others.

    It divides a token's weights by the sum of those that were kept.
    """
    ours = mixture(SHAPE, SHAPE.plain.model_copy(update={"capacity_factor": 1.0}))
    peer = _made("DeepSpeed capacity", ours)
    x = torch.randn(1, SHAPE.tokens, SHAPE.d_model, generator=torch.Generator().manual_seed(1))
    routing = ours.router(x[0])
    assert routing.dropped > 0
    gate = routing.gate_NK / routing.gate_NK.sum(-1, keepdim=True).clamp(min=1e-9)
    weights = ExpertWeights(Swiglu(), tuple(ours.experts.parameters()))
    expected = run_experts("reference", x[0], routing.expert_NK, gate, weights)
    torch.testing.assert_close(peer(x)[0][0], expected, rtol=1e-4, atol=1e-6)


def test_installed_peers_have_the_multiply_adds_of_the_dense_layer_and_the_others_are_named():
    layers, absent = peer_layers(SHAPE)
    assert {one.name for one in layers + absent} == set(OF)
    dense = 3 * 2 * 3 * SHAPE.tokens * SHAPE.d_model * SHAPE.top_k * SHAPE.d_expert
    for layer in layers:
        if layer.name == "transformers grouped_mm":  # torch's counter does not know its product
            continue
        case = Case(layer, SHAPE, "float32", CPU)
        with FlopCounterMode(display=False) as counter:
            case.run()
        # A router, and without dropping every expert is as wide as the fullest.
        most = 2.0 if layer.name == "DeepSpeed dropless" else 1.1
        assert dense <= counter.get_total_flops() <= most * dense, layer.name


def test_a_missing_or_old_package_is_one_line():
    peer = OF["DeepSpeed capacity"]
    assert why_not(peer, None) == "deepspeed is not installed: pip install 'deepspeed>=0.19.4'"
    assert "deepspeed 0.19.3+cpu is older than 0.19.4" in str(why_not(peer, "0.19.3+cpu"))
    assert why_not(peer, "0.19.4") is why_not(peer, "0.20.0.dev1") is why_not(peer, "1.0") is None
