import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.model.balance import balance_loss
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.model.router import Router
from mhmoe_ray.spec import ModelSpec, MoESpec


def build(heads, normalize_gates=False, kernel="grouped"):
    moe = MoESpec(heads=heads, experts=5, top_k=2, d_expert=6, every=1, normalize_gates=normalize_gates, kernel=kernel)
    spec = ModelSpec(vocab_size=8, d_model=24, layers=1, attention_heads=2, d_ff=8, moe=moe)
    decoder = Decoder(spec)
    init_weights(decoder, 1)
    [layer] = decoder.moe_layers()
    return layer.double()


def by_the_equations(layer: MultiHeadMoE, x_M: torch.Tensor, normalize: bool) -> torch.Tensor:
    """One token through METHOD's equations 1 to 6 without the sub-token residual, written with plain loops."""
    heads = layer.heads
    mixed = layer.head.weight @ x_M + layer.head.bias if heads > 1 else x_M
    pieces = []
    for j in range(heads):
        sub = mixed[j * len(mixed) // heads : (j + 1) * len(mixed) // heads]
        p = torch.softmax(layer.router.scores.weight_ED @ sub, 0)
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[: layer.router.moe.top_k]
        norm = sum(p[e] for e in chosen) if normalize else 1.0
        w = layer.experts
        experts = (w.down_EDF[e] @ (F.silu(w.gate_EFD[e] @ sub) * (w.up_EFD[e] @ sub)) for e in chosen)
        pieces.append(sum(p[e] / norm * y for e, y in zip(chosen, experts, strict=True)))
    joined = torch.cat(pieces)
    return layer.merge.weight @ joined + layer.merge.bias if heads > 1 else joined


@settings(deadline=None, max_examples=24)
@given(
    heads=st.sampled_from([1, 2, 3, 4, 6]), normalize=st.booleans(), kernel=st.sampled_from(["grouped", "reference"])
)
@torch.no_grad()
def test_the_layer_is_the_equations(heads, normalize, kernel):
    layer = build(heads, normalize, kernel)
    x = torch.randn(2, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(heads))
    y, _ = layer(x)
    expected = torch.stack([by_the_equations(layer, token, normalize) for token in x.flatten(0, 1)])
    torch.testing.assert_close(y.flatten(0, 1), expected)


@torch.no_grad()
def test_renaming_experts_changes_nothing():
    layer = build(2)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    before, _ = layer(x)
    order = torch.tensor([3, 0, 4, 1, 2])
    for weight in [layer.router.scores.weight_ED, *layer.experts.parameters()]:
        weight.copy_(weight[order].clone())
    torch.testing.assert_close(layer(x)[0], before)


def test_a_uniform_router_costs_exactly_one():
    uniform = torch.full((12, 4), 0.25)
    assert balance_loss(uniform, torch.arange(12)[:, None] % 4).item() == 1.0
    assert balance_loss(uniform, torch.zeros(12, 1, dtype=torch.int64)).item() == 1.0
    certain = F.one_hot(torch.zeros(12, dtype=torch.int64), 4).float()
    assert balance_loss(certain, torch.zeros(12, 1, dtype=torch.int64)).item() == 4.0


def test_routing_counts_all_choices_and_gates_are_the_largest_probabilities():
    router = Router(8, MoESpec(experts=6, top_k=3, d_expert=4, normalize_gates=True))
    torch.nn.init.normal_(router.scores.weight_ED)
    x = torch.randn(50, 8)
    routing = router(x)
    p = (x @ router.scores.weight_ED.T).softmax(-1)
    assert torch.equal(routing.expert_NK, p.topk(3).indices)
    torch.testing.assert_close(routing.gate_NK.sum(-1), torch.ones(50))
    assert routing.count_E.sum() == 150
    assert all(len(set(row.tolist())) == 3 for row in routing.expert_NK)
