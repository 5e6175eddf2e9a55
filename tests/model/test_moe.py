import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.router import Router
from mhmoe_ray.model.router.balance import switch_balance_loss
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.model.drawn import layers

pytestmark = pytest.mark.long


def project(projection, x):
    """Apply a head or merge projection to the vector x; return x if the model has no such projection."""
    if isinstance(projection, torch.nn.Identity):
        return x
    weights = list(projection.parameters())
    for i in range(0, len(weights), 2):
        x = weights[i] @ (x if i == 0 else x.clamp(min=0)) + weights[i + 1]
    return x


def expert_output(weights, x):
    """Return an expert's output for the vector x: SwiGLU if it has three weights, otherwise GELU with SubLN."""
    if len(weights) == 3:
        gate_weight, up_weight, down_weight = weights
        return down_weight @ (F.silu(gate_weight @ x) * (up_weight @ x))
    fc1, bias1, scale, shift, fc2, bias2 = weights
    hidden = F.gelu(fc1 @ x + bias1)
    normed = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-5).sqrt()
    return fc2 @ (normed * scale + shift) + bias2


def router_probabilities(scores, kind, x):
    """Return the probability of each expert for the vector x.

    Args:
        scores: module with the router's weights.
        kind: value of the key `router` in specs.
        x: sub-token.
    """
    if kind == "linear":
        return torch.softmax(scores.weight_ED @ x, 0)
    projected, embeddings = scores.reduce_QD @ x, scores.expert_EQ
    logits = torch.stack([projected @ e / e.norm() for e in embeddings])
    # 0.3 is the initial temperature of router `xmoe`.
    return torch.softmax(logits / projected.norm() / 0.3 if kind == "xmoe" else logits, 0)


def layer_output(layer, moe, x_M):
    """Return the layer's output for one token by equations 1 to 6 of the first MH-MoE paper, in plain loops."""
    mixed = project(layer.head, x_M)
    width = moe.d_sub_token or len(x_M) // moe.heads
    assert len(mixed) == moe.heads * width
    pieces = []
    for j in range(moe.heads):
        sub = mixed[j * width : (j + 1) * width]
        p = router_probabilities(layer.router.scores, moe.router, sub)
        chosen_experts = sorted(range(len(p)), key=lambda e: -p[e].item())[: moe.top_k]
        norm = sum(p[e] for e in chosen_experts) if moe.normalize_gates else 1.0
        outputs = (expert_output([w[e] for w in layer.experts.parameters()], sub) for e in chosen_experts)
        total = sum(p[e] / norm * y for e, y in zip(chosen_experts, outputs, strict=True))
        pieces.append(sub + total if moe.sub_token_residual else total)
    y = project(layer.merge, torch.cat(pieces))
    return y + expert_output(list(layer.shared.parameters()), x_M) if layer.shared else y


@settings(max_examples=150)
@given(data=st.data())
@torch.no_grad()
def test_layer_output_equals_the_papers_equations(data):
    layer, moe, x = data.draw(layers(capacity_factor=None))
    y, _ = layer(x)
    expected = torch.stack([layer_output(layer, moe, token) for token in x.flatten(0, 1)])
    torch.testing.assert_close(y.flatten(0, 1), expected)


@settings(max_examples=50)
@given(data=st.data(), heads=st.integers(1, 5), width=st.integers(1, 40))
@torch.no_grad()
def test_sub_tokens_may_have_any_width(data, heads, width):
    """The number of sub-tokens and their width do not depend on d_model."""
    projections = {"head_projection": True, "merge_projection": True}
    layer, moe, x = data.draw(layers(heads=heads, d_sub_token=width, capacity_factor=None, **projections))
    y, routing = layer(x)
    assert len(routing.expert_NK) == heads * x.shape[0] * x.shape[1]
    expected = torch.stack([layer_output(layer, moe, token) for token in x.flatten(0, 1)])
    torch.testing.assert_close(y.flatten(0, 1), expected)


MIXTRAL = ModelSpec(
    vocab_size=50,
    d_model=24,
    layers=2,
    attention_heads=4,
    kv_heads=2,
    tied_embeddings=False,
    moe=MoESpec(heads=1, experts=4, top_k=2, d_expert=20, every=1, normalize_gates=True),
)


def set_identities(layer, width):
    """Set projections so that the first sub-token is the token, and the output is that of the first sub-token.

    Where ReLU follows, an inner layer carries the positive and the negative parts of a token separately.
    """
    identity, zero = torch.eye(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    signs = torch.cat((identity, -identity))
    head, merge = ([p for p in side.parameters() if p.ndim == 2] for side in (layer.head, layer.merge))
    for p in (*layer.head.parameters(), *layer.merge.parameters()):
        if p.ndim == 1:
            p.zero_()
    if len(head) == 1:
        # The second sub-token keeps its random projection, because nothing reads its output.
        head[0][:width].copy_(identity)
        merge[0].copy_(torch.cat((identity, zero), dim=1))
        return
    for p in (*head[1:-1], *merge[1:-1]):
        p.copy_(torch.eye(2 * width))
    head[0].copy_(signs)
    head[-1][:width].copy_(signs.T)
    merge[0].copy_(torch.cat((signs, torch.zeros_like(signs)), dim=1))
    merge[-1].copy_(signs.T)


@pytest.mark.parametrize("projection_layers", [1, 2, 3])
@torch.no_grad()
def test_heads_with_sub_tokens_as_wide_as_tokens_can_compute_what_a_plain_mixture_computes(projection_layers):
    sub_tokens = {"heads": 2, "d_sub_token": MIXTRAL.d_model, "projection_layers": projection_layers}
    multi_head = MIXTRAL.with_moe(MoESpec(**MIXTRAL.moe.model_dump() | sub_tokens))
    plain_model, model = (Decoder(spec) for spec in (MIXTRAL, multi_head))
    init_weights(plain_model, 0)
    init_weights(model, 1)
    missing_names, unexpected_names = model.load_state_dict(plain_model.state_dict(), strict=False)
    assert all(".head." in name or ".merge." in name for name in missing_names)
    assert not unexpected_names
    for layer in model.double().moe_layers():
        set_identities(layer, MIXTRAL.d_model)
    tokens = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(0))
    expected, output = plain_model.double()(tokens), model(tokens)
    assert expected.logits_BTV.std() > 0.1
    torch.testing.assert_close(output.logits_BTV, expected.logits_BTV, rtol=0, atol=1e-12)
    for expected_routing, routing in zip(expected.routing, output.routing, strict=True):
        assert torch.equal(routing.expert_NK[::2], expected_routing.expert_NK)


@settings(max_examples=100)
@given(data=st.data())
@torch.no_grad()
def test_dropped_routes_contribute_nothing_and_kept_routes_stay_the_same(data):
    """The output with limited capacity is the sum over kept routes of the gate that a route has without a limit, times
    the output of its expert."""
    factor = data.draw(st.sampled_from([0.2, 0.7, 1.0]))
    layer_strategy = layers(capacity_factor=factor, merge_projection=False, d_shared=0, sub_token_residual=False)
    layer, moe, x = data.draw(layer_strategy)
    y, routing = layer(x)
    _, free = layer.eval()(x)
    x_ND = layer.head(x).reshape(len(routing.gate_NK), -1)
    for n, row in enumerate(x_ND):
        expected = torch.zeros_like(row)
        for k in range(moe.top_k):
            if routing.gate_NK[n, k]:
                e = int(free.expert_NK[n, k])
                expected += free.gate_NK[n, k] * expert_output([w[e] for w in layer.experts.parameters()], row)
        torch.testing.assert_close(y.view_as(x_ND)[n], expected)
    assert int(routing.dropped_routes) >= len(x_ND) * moe.top_k - moe.experts * math.ceil(
        factor * moe.top_k * math.ceil(len(x_ND) / moe.experts)
    )


def test_balance_loss_is_one_for_uniform_and_the_expert_count_for_certain_probabilities():
    uniform = torch.full((12, 4), 0.25)
    assert switch_balance_loss(uniform, torch.arange(12)[:, None] % 4).item() == 1.0
    assert switch_balance_loss(uniform, torch.zeros(12, 1, dtype=torch.int64)).item() == 1.0
    certain = F.one_hot(torch.zeros(12, dtype=torch.int64), 4).float()
    assert switch_balance_loss(certain, torch.zeros(12, 1, dtype=torch.int64)).item() == 4.0


def test_router_chooses_the_most_probable_experts_and_counts_all_choices():
    router = Router(8, MoESpec(experts=6, top_k=3, d_expert=4, normalize_gates=True))
    torch.nn.init.normal_(router.scores.weight_ED)
    x = torch.randn(50, 8)
    routing = router(x)
    p = (x @ router.scores.weight_ED.T).softmax(-1)
    assert torch.equal(routing.expert_NK, p.topk(3).indices)
    torch.testing.assert_close(routing.gate_NK.sum(-1), torch.ones(50))
    assert routing.count_E.sum() == 150
    assert all(len(set(row.tolist())) == 3 for row in routing.expert_NK)
