"""Tests of presets: the papers' models have their published sizes, and the models of a family cost the same."""

from pathlib import Path

import pytest

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.match import compare_models
from mhmoe_ray.planner.papers import P1_EXPERTS, P1_HEADS
from mhmoe_ray.planner.resolve import all_presets, find_preset, preset_models
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import load_sweep

NAMES = [name for name, _, _ in all_presets()]


def parts_of(name, size=None):
    """Return the numbers of parameters of a preset's model: without its experts, of its experts, and in total."""
    sizes = compute_sizes(preset_models(find_preset(name, size))[0])
    return sizes.parameters - sizes.expert_parameters, sizes.expert_parameters, sizes.parameters


# Table 11 of the first MH-MoE paper. A row has the number of experts, and the parameters of X-MoE and of MH-MoE in
# millions: without experts, of the experts, and in total.
TABLE_11 = [
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


# The rows of multimodal models in table 11: the total parameters of X-MoE and of MH-MoE in millions. Which layers
# of the presets have experts is inferred, so the totals agree only approximately.
@pytest.mark.parametrize(("experts", "xmoe", "mhmoe"), [(8, 514, 505), (32, 1228, 1209)])
def test_the_first_papers_multimodal_models_are_within_four_percent_of_table_11(experts, xmoe, mhmoe):
    assert parts_of("p1-multimodal-dense") == (276_510_730, 0, 276_510_730)
    for name, millions in [(f"xmoe-{experts}", xmoe), (f"mhmoe-{experts}-h4", mhmoe)]:
        assert parts_of(f"p1-multimodal-{name}")[2] == pytest.approx(1e6 * millions, rel=0.04)


@pytest.mark.parametrize("experts", P1_EXPERTS)
@pytest.mark.parametrize("heads", [h for h in P1_HEADS if h != 4])
def test_other_heads_of_the_first_paper_have_no_more_parameters_than_xmoe(experts, heads):
    mhmoe, xmoe = (parts_of(name)[2] for name in (f"p1-mhmoe-{experts}-h{heads}", f"p1-xmoe-{experts}"))
    assert 0.999 < mhmoe / xmoe <= 1.0


def test_first_papers_presets_have_the_settings_of_its_runs():
    model, reference = preset_models(find_preset("p1-mhmoe-32-h4"))
    assert (model.moe.capacity_factor, model.moe.second_expert, model.moe.normalize_gates) == (1.0, "random", True)
    assert (model.dropout, model.attention_dropout) == (0.1, 0.1)
    four = preset_models(find_preset("p1-mhmoe-32-h4-k4"))[0].moe
    assert (four.top_k, four.capacity_factor, four.second_expert) == (4, None, "always")
    compute = compare_models(model, reference)["multiply-adds of expert layers"].ratio
    # The second MH-MoE paper says that at equal parameters, this model has about 4.1 times the reference's compute.
    assert compute == pytest.approx(130 / 32, rel=0.02)


@pytest.mark.parametrize("shared", ["", "-shared"])
def test_the_follow_up_papers_rows_cost_the_same_and_differ_in_parameters_as_published(shared):
    expected = {"fine-grained": 1.0, "mhmoe-h2": 0.969, "mhmoe-h3": 1.031}
    for name, ratio in expected.items():
        model, reference = preset_models(find_preset(f"p2-{name}{shared}"))
        comparisons = compare_models(model, reference)
        assert comparisons["multiply-adds of expert layers"].ratio == 1.0
        model_layer, reference_layer = (
            compute_sizes(m).parameters - compute_sizes(m.with_moe(None)).parameters for m in (model, reference)
        )
        dense = 6 * 3 * 768 * 2048  # parameters of the dense layers that the expert layers replace
        routers = [6 * m.moe.experts * 768 // m.moe.heads for m in (model, reference)]
        # The second MH-MoE paper does not count the biases of the head and merge projections.
        biases = 6 * 2 * 768 if model.moe.heads > 1 else 0
        shared_width = 6 * 3 * 768 * model.moe.d_shared
        model_parameters = model_layer + dense - routers[0] - biases - shared_width
        assert model_parameters / (reference_layer + dense - routers[1] - shared_width) == pytest.approx(
            ratio, abs=0.0005
        )
    moe = 6 * (4_718_592 + (4_718_592 if shared else 0))
    smoe = compute_sizes(preset_models(find_preset(f"p2-smoe{shared}"))[0])
    assert smoe.moe_macs_per_token - smoe.router_macs_per_token == moe


def test_mixtral_has_its_published_size():
    sizes = compute_sizes(preset_models(find_preset("mixtral-8x7b"))[0])
    assert sizes.parameters == 46_702_792_704
    assert round(sizes.active_parameters / 1e9, 1) == 12.9


def test_models_of_the_first_papers_review_are_presets():
    assert {f"rebuttal-{kind}-k{k}" for kind in ("xmoe", "mhmoe") for k in (3, 4)} <= set(NAMES)
    small_model, large_model = (preset_models(find_preset(f"rebuttal-smoe-{e}"))[0] for e in ("128-k1", "256-k2"))
    assert (small_model.layers, small_model.moe.experts, small_model.moe.top_k) == (3, 128, 1)
    assert (large_model.moe.experts, large_model.moe.top_k) == (256, 2)


def routing_of(name):
    """Return the settings of a preset's routing and gates, apart from the number of choices."""
    moe = preset_models(find_preset(name))[0].moe
    return moe.router, moe.capacity_factor, moe.second_expert, moe.normalize_gates


def test_sweeps_of_top_k_compare_one_routing_and_one_kind_of_gates():
    for model in ("xmoe-8", "mhmoe-8-h2"):
        names = [f"p1-{model}-dropless", f"p1-{model}-k3", f"p1-{model}-k4"]
        assert {routing_of(name) for name in names} == {("xmoe_torchscale", None, "always", True)}
        assert [preset_models(find_preset(name))[0].moe.top_k for name in names] == [2, 3, 4]
    names = ["rebuttal-smoe-128-k1", "rebuttal-smoe-256-k2-raw"]
    assert {routing_of(name) for name in names} == {("xmoe_torchscale", None, "always", False)}
    sweep = load_sweep(Path(__file__).parents[2] / "jobs/paper/top-k.yaml")
    presets = [settings["preset"] for settings in sweep.runs.values()]
    assert len({routing_of(preset) for preset in presets}) == 1


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_families_of_a_size_cost_the_same(size):
    _, smoe = preset_models(find_preset("mhmoe", size))
    for name in ("fine_grained", "xmoe", "mhmoe", "deepseek"):
        comparisons = compare_models(preset_models(find_preset(name, size))[0], smoe)
        assert comparisons["multiply-adds of expert layers"].ratio == pytest.approx(1.0, abs=0.015), name
        assert comparisons["parameters"].ratio == pytest.approx(1.0, abs=0.03), name
    dense = preset_models(find_preset("dense", size))[0]
    comparisons = compare_models(dense, smoe)
    assert comparisons["multiply-adds per token"].ratio == pytest.approx(1.0, abs=0.01)
    assert comparisons["parameters"].ratio < 0.6


def test_the_base_families_are_the_follow_up_papers_models():
    for family, name in [("smoe", "p2-smoe"), ("fine_grained", "p2-fine-grained"), ("mhmoe", "p2-mhmoe-h2")]:
        assert preset_models(find_preset(family, "base"))[0] == preset_models(find_preset(name))[0]
        assert find_preset(family, "base").train.items() <= find_preset(name).train.items()


def test_error_of_an_unknown_preset_suggests_the_nearest_name():
    with pytest.raises(SpecError, match="did you mean 'p1-mhmoe-8-h"):
        find_preset("p1-mhmoe-8-h5")
    with pytest.raises(SpecError, match="`size` would be ignored"):
        find_preset("p2-smoe", "tiny")
