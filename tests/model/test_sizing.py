import pytest

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.sizing import sizes
from mhmoe_ray.spec import ModelSpec, MoESpec


def spec(moe=None, d=768, layers=12):
    return ModelSpec(vocab_size=1000, d_model=d, layers=layers, attention_heads=12, d_ff=2048, moe=moe)


@pytest.mark.parametrize(
    "moe",
    [
        None,
        MoESpec(heads=1, experts=3, top_k=1, d_expert=10),
        MoESpec(heads=2, experts=4, top_k=2, d_expert=24, every=1),
        MoESpec(heads=4, experts=6, top_k=3, d_expert=5, every=3),
    ],
)
def test_parameters_from_the_spec_are_those_of_a_built_model(moe):
    small = spec(moe, d=48, layers=6)
    model = Decoder(small)
    assert sizes(small).parameters == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert sizes(small).expert_parameters == experts


@pytest.mark.parametrize(
    ("heads", "top_k", "d_expert", "experts"), [(1, 1, 2048, 8), (1, 2, 1024, 16), (2, 2, 768, 40), (3, 3, 512, 96)]
)
def test_the_follow_up_papers_layers_cost_the_same(heads, top_k, d_expert, experts):
    """P2's table: 4,718,592 multiply-adds per token and layer in each row, the router's not counted."""
    moe = MoESpec(heads=heads, experts=experts, top_k=top_k, d_expert=d_expert)
    router = 768 * experts  # h sub-tokens of width d/h
    assert sizes(spec(moe)).moe_macs_per_token // 6 - router == 4_718_592


def test_active_parameters_count_each_expert_once():
    moe = MoESpec(heads=4, experts=6, top_k=3, d_expert=5)  # 12 routes, 6 experts
    found = sizes(spec(moe, d=48, layers=2))
    assert found.active_parameters == found.parameters
