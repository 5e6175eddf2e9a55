import pytest

from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import ModelSpec, MoESpec


def spec(moe=None, d=768, layers=12):
    return ModelSpec(vocab_size=1000, d_model=d, layers=layers, attention_heads=12, d_ff=2048, moe=moe)


def p1(moe=None):
    """Return the sizes of the first MH-MoE paper's language model, dense by default: 12 layers of width 768, and a
    vocabulary of 100,287 tokens as in its logs."""
    shape = {"vocab_size": 100_287, "d_model": 768, "layers": 12, "attention_heads": 12, "d_ff": 3072}
    return compute_sizes(ModelSpec(backbone="subln", **shape, moe=moe))


def p1_moe(**fields):
    """Return a spec of experts with the router and the top 2 of the first MH-MoE paper."""
    return MoESpec(router="xmoe_torchscale", top_k=2, **fields)


def test_the_first_papers_models_have_the_parameters_of_its_logs():
    assert p1().parameters == 162_168_576
    xmoe = p1(p1_moe(heads=1, experts=8, d_expert=3072))
    assert xmoe.parameters - xmoe.expert_parameters == 133_871_616
    assert xmoe.expert_parameters == 48 * 4_728_576 == 226_971_648
    mhmoe = p1(p1_moe(heads=2, experts=8, d_expert=3072))
    assert mhmoe.parameters - mhmoe.expert_parameters == 140_921_856
    assert mhmoe.expert_parameters == 48 * 2_368_896


@pytest.mark.parametrize(
    ("heads", "top_k", "d_expert", "experts"), [(1, 1, 2048, 8), (1, 2, 1024, 16), (2, 2, 768, 40), (3, 3, 512, 96)]
)
def test_the_follow_up_papers_layers_cost_the_same(heads, top_k, d_expert, experts):
    """Each row of the second MH-MoE paper's table has 4,718,592 multiply-adds per token and layer, besides the
    router's."""
    moe = MoESpec(heads=heads, experts=experts, top_k=top_k, d_expert=d_expert)
    router = 768 * experts  # each of h sub-tokens has 768 / h values
    assert compute_sizes(spec(moe)).moe_macs_per_token // 6 - router == 4_718_592


def test_active_parameters_count_each_expert_once():
    moe = MoESpec(heads=4, experts=6, top_k=3, d_expert=5)  # a token has 12 routes, but there are only 6 experts
    sizes = compute_sizes(spec(moe, d=48, layers=2))
    assert sizes.active_parameters == sizes.parameters
