import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.model.router import Router, balance_loss
from mhmoe_ray.spec import MoESpec
from tests.model.drawn import layers

pytestmark = pytest.mark.long


def project(projection, x):
    """Apply a head or merge projection to the vector x; it is the identity if the model has none."""
    return x if isinstance(projection, torch.nn.Identity) else projection.weight @ x + projection.bias


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
    """Return the layer's output for one token by equations 1 to 6 of the first paper, with plain loops."""
    mixed = project(layer.head, x_M)
    pieces = []
    for j in range(moe.heads):
        sub = mixed[j * len(mixed) // moe.heads : (j + 1) * len(mixed) // moe.heads]
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


@settings(max_examples=100)
@given(data=st.data())
@torch.no_grad()
def test_dropped_routes_contribute_nothing_and_kept_routes_stay_the_same(data):
    """The output with limited capacity is a sum over kept routes: gate without limit, times output of the expert."""
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
    assert balance_loss(uniform, torch.arange(12)[:, None] % 4).item() == 1.0
    assert balance_loss(uniform, torch.zeros(12, 1, dtype=torch.int64)).item() == 1.0
    certain = F.one_hot(torch.zeros(12, dtype=torch.int64), 4).float()
    assert balance_loss(certain, torch.zeros(12, 1, dtype=torch.int64)).item() == 4.0


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
