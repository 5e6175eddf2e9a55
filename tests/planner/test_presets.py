"""The papers' models and the families: their sizes are the published ones, and each of them is a complete spec."""

import pytest

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.match import parity
from mhmoe_ray.planner.papers import P1_EXPERTS, P1_HEADS
from mhmoe_ray.planner.resolve import every_preset, find_preset, models_of
from mhmoe_ray.planner.sizes import sizes

NAMES = [name for name, _, _ in every_preset()]


def parts_of(name, size=None):
    found = sizes(models_of(find_preset(name, size))[0])
    return found.parameters - found.expert_parameters, found.expert_parameters, found.parameters


TABLE_11 = [  # experts, X-MoE, MH-MoE: other parameters, experts' and all, in millions
    (8, (134, 227, 361), (141, 213, 354)),
    (16, (134, 454, 588), (141, 430, 571)),
    (32, (134, 908, 1042), (141, 898, 1039)),
    (64, (134, 1815, 1949), (141, 1797, 1938)),
    (128, (134, 3631, 3765), (141, 3624, 3765)),
    (256, (134, 7263, 7397), (141, 7230, 7371)),
]


@pytest.mark.parametrize(("experts", "xmoe", "mhmoe"), TABLE_11)
def test_the_first_papers_table_11_holds_within_a_million(experts, xmoe, mhmoe):
    for name, row in [(f"p1-xmoe-{experts}", xmoe), (f"p1-mhmoe-{experts}-h4", mhmoe)]:
        assert parts_of(name) == pytest.approx([1e6 * million for million in row], abs=1.0e6)


def test_the_first_papers_dense_model_and_logs_are_exact():
    assert parts_of("p1-dense") == (162_168_576, 0, 162_168_576)
    assert parts_of("p1-xmoe-8")[:2] == (133_871_616, 48 * 4_728_576)
    assert parts_of("p1-mhmoe-8-h2")[0] == 140_921_856


@pytest.mark.parametrize("experts", P1_EXPERTS)
@pytest.mark.parametrize("heads", [h for h in P1_HEADS if h != 4])
def test_other_heads_of_the_first_paper_have_no_more_parameters_than_xmoe(experts, heads):
    ours, xmoe = (parts_of(name)[2] for name in (f"p1-mhmoe-{experts}-h{heads}", f"p1-xmoe-{experts}"))
    assert 0.999 < ours / xmoe <= 1.0


def test_the_first_paper_is_as_it_was_run():
    ours, reference = models_of(find_preset("p1-mhmoe-32-h4"))
    assert (ours.moe.capacity_factor, ours.moe.second_expert, ours.moe.normalize_gates) == (1.0, "random", True)
    assert (ours.dropout, ours.attention_dropout) == (0.1, 0.1)
    four = models_of(find_preset("p1-mhmoe-32-h4-k4"))[0].moe
    assert (four.top_k, four.capacity_factor, four.second_expert) == (4, None, "always")
    compute = parity(ours, reference)["multiply-adds of expert layers"].ratio
    assert compute == pytest.approx(130 / 32, rel=0.02)  # P2: equal parameters, about 4.1 times the compute


@pytest.mark.parametrize("shared", ["", "-shared"])
def test_the_follow_up_papers_rows_cost_the_same_and_differ_in_parameters_as_published(shared):
    expected = {"fine-grained": 1.0, "mhmoe-h2": 0.969, "mhmoe-h3": 1.031}
    for name, ratio in expected.items():
        model, reference = models_of(find_preset(f"p2-{name}{shared}"))
        found = parity(model, reference)
        assert found["multiply-adds of expert layers"].ratio == 1.0
        layer, other = (sizes(m).parameters - sizes(m.with_moe(None)).parameters for m in (model, reference))
        dense = 6 * 3 * 768 * 2048  # what the expert layers take the place of
        routers = [6 * m.moe.experts * 768 // m.moe.heads for m in (model, reference)]
        biases = 6 * 2 * 768 if model.moe.heads > 1 else 0  # and these the paper does not count
        shared_width = 6 * 3 * 768 * model.moe.d_shared
        ours = layer + dense - routers[0] - biases - shared_width
        assert ours / (other + dense - routers[1] - shared_width) == pytest.approx(ratio, abs=0.0005)
    moe = 6 * (4_718_592 + (4_718_592 if shared else 0))
    smoe = sizes(models_of(find_preset(f"p2-smoe{shared}"))[0])
    assert smoe.moe_macs_per_token - smoe.router_macs_per_token == moe


def test_mixtral_has_its_published_size():
    found = sizes(models_of(find_preset("mixtral-8x7b"))[0])
    assert found.parameters == 46_702_792_704
    assert round(found.active_parameters / 1e9, 1) == 12.9


def test_reviews_runs_are_there():
    assert {f"rebuttal-{kind}-k{k}" for kind in ("xmoe", "mhmoe") for k in (3, 4)} <= set(NAMES)
    few, many = (models_of(find_preset(f"rebuttal-smoe-{e}"))[0] for e in ("128-k1", "256-k2"))
    assert (few.layers, few.moe.experts, few.moe.top_k) == (3, 128, 1)
    assert (many.moe.experts, many.moe.top_k) == (256, 2)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_families_of_a_size_cost_the_same(size):
    _, smoe = models_of(find_preset("mhmoe", size))
    for name in ("fine_grained", "xmoe", "mhmoe", "deepseek"):
        found = parity(models_of(find_preset(name, size))[0], smoe)
        assert found["multiply-adds of expert layers"].ratio == pytest.approx(1.0, abs=0.015), name
        assert found["parameters"].ratio == pytest.approx(1.0, abs=0.03), name
    dense = models_of(find_preset("dense", size))[0]
    found = parity(dense, smoe)
    assert found["multiply-adds per token"].ratio == pytest.approx(1.0, abs=0.01)
    assert found["parameters"].ratio < 0.6


def test_the_base_families_are_the_follow_up_papers_models():
    for family, name in [("smoe", "p2-smoe"), ("fine_grained", "p2-fine-grained"), ("mhmoe", "p2-mhmoe-h2")]:
        assert models_of(find_preset(family, "base"))[0] == models_of(find_preset(name))[0]
        assert find_preset(family, "base").train.items() <= find_preset(name).train.items()


def test_a_wrong_name_gets_the_nearest_right_one():
    with pytest.raises(SpecError, match="did you mean 'p1-mhmoe-8-h"):
        find_preset("p1-mhmoe-8-h5")
    with pytest.raises(SpecError, match="`size` would be ignored"):
        find_preset("p2-smoe", "tiny")
