"""Tests that layers of other packages compute the same as ours from the same weights."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_kernels import ExpertWeights, Swiglu, run_experts
from mhmoe_ray.bench.layers import LayerCase, LayerShape, build_mixture
from mhmoe_ray.bench.peers import PEERS, installed_version, peer_layers, unavailable_reason

pytestmark = pytest.mark.long

SHAPE = LayerShape(tokens=40, d_model=32, experts=4, top_k=2, d_expert=48)
CPU = torch.device("cpu")
PEER_BY_NAME = {peer.name: peer for peer in PEERS}


def _build_peer(name, our_layer):
    peer = PEER_BY_NAME[name]
    if reason := unavailable_reason(peer, installed_version(peer.package), CPU):
        pytest.skip(reason)
    return peer.build(our_layer)


def _output_and_gradients(layer, x, weights):
    """Return the output y, and the gradients of sum(y^2) with respect to the input `x` and to `weights`."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    gradients = torch.autograd.grad(y.square().sum(), [x, *weights])
    return y.detach(), *gradients


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("name", ["transformers eager", "transformers grouped_mm", "DeepSpeed dropless"])
def test_dropless_peer_matches_our_layer(name, top_k):
    our_layer = build_mixture(
        SHAPE.d_model, SHAPE._replace(top_k=top_k).plain_moe.model_copy(update={"normalize_gates": True})
    )
    peer = _build_peer(name, our_layer)
    x = torch.randn(1, SHAPE.tokens, SHAPE.d_model, generator=torch.Generator().manual_seed(1))
    [router] = our_layer.router.parameters()
    peer_parameters = dict(peer.named_parameters())
    peer_router = peer_parameters.get("gate.weight", peer_parameters.get("deepspeed_moe.gate.wg.weight"))
    expected = _output_and_gradients(our_layer, x, [router])
    for actual, expected_tensor in zip(_output_and_gradients(peer, x, [peer_router]), expected, strict=True):
        torch.testing.assert_close(actual, expected_tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("default")  # tracing gives rise to warnings inside torch
def test_compiled_peer_matches_our_layer_in_bfloat16():
    """torch compiles its grouped product in bfloat16 only."""
    moe = SHAPE.plain_moe.model_copy(update={"normalize_gates": True})
    our_layer = build_mixture(SHAPE.d_model, moe).bfloat16()
    peer = _build_peer("torch compiled", our_layer)
    x = torch.randn(1, SHAPE.tokens, SHAPE.d_model, generator=torch.Generator().manual_seed(1)).bfloat16()
    [router] = our_layer.router.parameters()
    expected = _output_and_gradients(our_layer, x, [router])
    for actual, expected_tensor in zip(_output_and_gradients(peer, x, [peer.router_ED]), expected, strict=True):
        assert (actual - expected_tensor).norm() < 0.02 * expected_tensor.norm()


def test_deepspeed_capacity_matches_our_static_routing():
    """DeepSpeed drops the same routes as our static routing with two choices per token, and gives the same outputs.

    It divides a token's gates by the sum of those that were kept, so the test does this to our gates.
    """
    # SHAPE has two choices per token. With another number of choices, DeepSpeed drops other routes than our static
    # routing.
    our_layer = build_mixture(SHAPE.d_model, SHAPE.plain_moe.model_copy(update={"capacity_factor": 1.0}))
    peer = _build_peer("DeepSpeed capacity", our_layer)
    x = torch.randn(1, SHAPE.tokens, SHAPE.d_model, generator=torch.Generator().manual_seed(1))
    routing = our_layer.router(x[0])
    assert routing.dropped_routes > 0
    gate = routing.gate_NK / routing.gate_NK.sum(-1, keepdim=True).clamp(min=1e-9)
    weights = ExpertWeights(Swiglu(), tuple(our_layer.experts.parameters()))
    expected = run_experts("reference", x[0], routing.expert_NK, gate, weights)
    torch.testing.assert_close(peer(x)[0][0], expected, rtol=1e-4, atol=1e-6)


def test_peers_cost_as_much_as_dense_layer():
    layers, skipped = peer_layers(SHAPE, CPU)
    assert {case.name for case in layers + skipped} == set(PEER_BY_NAME)
    dense_flops = 3 * 2 * 3 * SHAPE.tokens * SHAPE.d_model * SHAPE.top_k * SHAPE.d_expert
    for layer in layers:
        # torch does not count the FLOPs of its grouped matrix product.
        if layer.name in ("transformers grouped_mm", "torch compiled"):
            continue
        case = LayerCase(layer, SHAPE, "float32", CPU)
        with FlopCounterMode(display=False) as counter:
            case.run()
        # The router adds to the FLOPs of the dense layer. Without dropping, DeepSpeed also pads the rows of each expert
        # to the number of rows of the fullest expert.
        max_ratio = 2.0 if layer.name == "DeepSpeed dropless" else 1.1
        assert dense_flops <= counter.get_total_flops() <= max_ratio * dense_flops, layer.name


def test_missing_or_old_package_is_one_line():
    peer = PEER_BY_NAME["DeepSpeed capacity"]
    assert unavailable_reason(peer, None, CPU) == "deepspeed is not installed: pip install 'deepspeed>=0.19.4'"
    assert "deepspeed 0.19.3+cpu is older than 0.19.4" in str(unavailable_reason(peer, "0.19.3+cpu", CPU))
    assert (
        unavailable_reason(peer, "0.19.4", CPU)
        is unavailable_reason(peer, "0.20.0.dev1", CPU)
        is unavailable_reason(peer, "1.0", CPU)
        is None
    )


def test_peer_for_gpus_is_not_measured_on_a_cpu():
    for name in ("SonicMoE", "ScatterMoE"):
        reason = unavailable_reason(PEER_BY_NAME[name], "9.0", CPU)
        assert reason == f"{PEER_BY_NAME[name].package} runs on NVIDIA's GPUs only"
    missing_reason = unavailable_reason(PEER_BY_NAME["ScatterMoE"], None, torch.device("cuda"))
    assert missing_reason == "scattermoe is not installed: pip install 'git+https://github.com/shawntan/scattermoe'"
