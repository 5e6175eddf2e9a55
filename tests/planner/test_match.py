import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhmoe_ray.errors import SpecError
from mhmoe_ray.model.router import SCORES_BY_ROUTER
from mhmoe_ray.planner.match import MatchSpec, compare_models, experts_without_ep, matched_heads, solve_match
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.support.decoders import BACKBONES
from tests.support.specs import tiny_spec


def model(moe, d=768, d_ff=2048, **trunk):
    """Return a model with 12 layers; `moe` has keys of MoESpec, and `trunk` keys of ModelSpec."""
    moe = MoESpec(**{"d_expert": 8, "experts": 1 << 16, **moe})
    shape = {"vocab_size": 32_000, "d_model": d, "layers": 12, "attention_heads": 12, "d_ff": d_ff}
    return ModelSpec(**shape, **trunk, moe=moe)


SMOE = model({"heads": 1, "experts": 8, "top_k": 1, "d_expert": 2048})


def solve(moe, reference=SMOE, **match):
    """Return the expert width and the number of experts with which a model with `moe` matches the reference."""
    return solve_match(model(moe), reference, MatchSpec(to="reference", **match))


def test_solve_match_finds_the_follow_up_papers_rows():
    """The second MH-MoE paper (P2) compares SMoE, with 8 experts of width 2048 and top 1, with two models: 2 heads with
    40 experts of width 768 and top 2, and 3 heads with 96 experts of width 512 and top 3."""
    assert solve({"heads": 2, "top_k": 2}, by="both") == (768, 40)
    assert solve({"heads": 3, "top_k": 3}, by="both") == (512, 96)
    assert solve({"heads": 1, "top_k": 2}, by="both") == (1024, 16)
    assert solve({"heads": 2, "top_k": 2, "experts": 40}, by="flops") == (768, 40)
    # At exactly equal parameters there are 41.3 and 93 experts, which P2 rounds to 40 and 96.
    assert solve({"heads": 2, "top_k": 2}, by="both", multiple=1) == (768, 41)
    assert solve({"heads": 3, "top_k": 3}, by="both", multiple=1) == (512, 93)


def test_the_first_papers_width_is_the_one_of_equal_parameters():
    """The width that matches parameters differs by at most three from that of the first MH-MoE paper's rule, which
    leaves out the router. That paper's models have biases and SubLN."""
    from mhmoe_ray.planner.papers import equal_parameter_width

    trunk = {"backbone": "subln", "d_ff": 3072}
    for heads in (2, 4, 6, 8, 12):
        routing = {"router": "xmoe_torchscale", "top_k": 2, "experts": 32}
        xmoe = model({"heads": 1, "d_expert": 3072, **routing}, **trunk)
        mhmoe = model({"heads": heads, **routing}, **trunk)
        width, experts = solve_match(mhmoe, xmoe, MatchSpec(to="x", by="params", multiple=1))
        assert experts == 32
        assert abs(width - equal_parameter_width(heads, 32, 768, 3072)) <= 3


@pytest.mark.parametrize("heads", [-2, 0, 5])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    with pytest.raises(SpecError, match=f"heads {heads}: a width of 768 does not split into so many parts"):
        matched_heads(SMOE, heads)


@settings(max_examples=80)
@given(
    heads=st.sampled_from([1, 2, 3, 4, 6, 12]), top_k=st.integers(1, 4), multiple=st.sampled_from([1, 2, 8]),
    router=st.sampled_from(list(SCORES_BY_ROUTER)), backbone=st.sampled_from(BACKBONES),
    d_shared=st.sampled_from([0, 256]), d_ff=st.sampled_from([1024, 2048, 3072]),
    quantity=st.sampled_from(["flops", "params", "both"]), width=st.sampled_from([None, 100, 768]),
)  # fmt: skip
def test_the_solution_is_nearest_to_the_reference(
    heads, top_k, multiple, router, backbone, d_shared, d_ff, quantity, width
):
    trunk = {"backbone": backbone, "d_ff": d_ff}
    reference = model({"heads": 1, "experts": 8, "top_k": 1, "d_expert": d_ff}, **trunk)
    moe = {"heads": heads, "top_k": top_k, "router": router, "d_shared": d_shared, "experts": 16}
    if heads > 1:
        moe["d_sub_token"] = width
    model_to_solve = model(moe, **trunk)
    try:
        d_expert, experts = solve_match(
            model_to_solve, reference, MatchSpec(to="reference", by=quantity, multiple=multiple)
        )
    except SpecError:
        assume(False)

    def model_with(d_expert, experts):
        return model({**moe, "d_expert": d_expert, "experts": experts}, **trunk)

    def compute(d_expert, experts):
        sizes = compute_sizes(model_with(d_expert, experts))
        return sizes.macs_per_token - sizes.router_macs_per_token

    def parameters(d_expert, experts):
        return compute_sizes(model_with(d_expert, experts)).parameters

    reference_sizes = compute_sizes(reference)
    compute_goal = reference_sizes.macs_per_token - reference_sizes.router_macs_per_token
    target, count = (reference_sizes.parameters, parameters) if quantity == "params" else (compute_goal, compute)

    def steps(value):
        """Return the steps to whose multiples a value may have been rounded, the largest first."""
        return [multiple // part for part in (1, 2, 4, 8) if multiple % part == 0 and value % (multiple // part) == 0]

    def is_nearest(value, neighbour, error, neighbour_error):
        return abs(error) <= abs(neighbour_error) or abs(value / neighbour - 1) > 0.04

    for step in steps(d_expert)[:1]:
        for neighbour in (d_expert - step, d_expert + step):
            if neighbour > 0:
                errors = (count(value, experts) - target for value in (d_expert, neighbour))
                assert is_nearest(d_expert, neighbour, *errors)
    assert steps(d_expert)
    if quantity != "both":
        assert experts == 16
        return
    for step in steps(experts)[:1]:
        for neighbour in (experts - step, experts + step):
            if neighbour >= top_k:
                error, neighbour_error = (
                    parameters(d_expert, e) - reference_sizes.parameters for e in (experts, neighbour)
                )
                assert is_nearest(experts, neighbour, error, neighbour_error)
    assert steps(experts)


def test_rounding_takes_smaller_steps_if_the_error_is_large():
    shared = model({"heads": 1, "experts": 8, "top_k": 1, "d_expert": 2048, "d_shared": 2048})
    width, experts = solve({"heads": 2, "top_k": 2}, shared, by="both")
    matched = model({"heads": 2, "top_k": 2, "d_expert": width, "experts": experts})
    assert experts % 8
    assert compare_models(matched, shared)["parameters"].ratio == pytest.approx(1.0, abs=0.04)
    assert compare_models(matched, shared)["multiply-adds of expert layers"].ratio == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("ep", "experts"), [(2, 40), (3, 42), (4, 40), (5, 40), (6, 42), (7, 42), (8, 40), (9, 45), (16, 48)]
)
def test_experts_divide_over_any_number_of_ranks_and_stay_near_the_match(ep, experts):
    """The model has exactly the reference's number of parameters at 41.3 experts."""
    moe = {"heads": 2, "top_k": 2}
    assert solve_match(model(moe), SMOE, MatchSpec(to="reference", by="both"), ep=ep) == (768, experts)
    matched = model({**moe, "d_expert": 768, "experts": experts})
    spec = tiny_spec(
        model=matched.model_dump(),
        reference={"name": "smoe", "moe": SMOE.moe.model_dump()},
        cluster={"ep": ep, "workers": ep},
        train={"micro_batches": ep},
    )
    assert experts_without_ep(spec) == (41 if experts > 42 else None)
    assert experts_without_ep(spec.model_copy(update={"cluster": tiny_spec().cluster})) is None


def test_a_match_without_a_solution_is_an_error():
    with pytest.raises(SpecError, match="have as much as reference already; match a larger reference, or lower"):
        solve({"heads": 2, "top_k": 2, "d_shared": 4096}, by="flops")
    with pytest.raises(SpecError, match=r"have as much as reference already; .*d_sub_token"):
        solve({"heads": 4, "top_k": 2, "d_sub_token": 768}, by="flops")
    single_expert = model({"heads": 1, "experts": 1, "top_k": 1, "d_expert": 2048})
    unmatched = model({"heads": 1, "top_k": 4, "d_expert": 2048})
    with pytest.raises(SpecError, match="but each row needs 4"):
        solve_match(unmatched, single_expert, MatchSpec(to="one", by="both"), fixed_keys={"d_expert"})


def test_a_comparison_shows_equal_and_unequal_counts():
    mhmoe_h3 = model({"heads": 3, "top_k": 3, "d_expert": 512, "experts": 96})
    comparisons = compare_models(mhmoe_h3, SMOE)
    assert comparisons["multiply-adds of expert layers"].ratio == 1.0
    assert comparisons["hidden activations per token"].ratio == 9 * 512 / 2048
    assert 1.0 < comparisons["parameters"].ratio < 1.03
    dense = SMOE.with_moe(None)
    assert set(compare_models(SMOE, dense)) == {"parameters", "active parameters", "multiply-adds per token"}
    # At equal parameters, the expert layers of the first MH-MoE paper's model have about 4.1 times the compute of
    # those of its reference X-MoE, at top 2 (section 2 of the second MH-MoE paper).
    p1 = {"backbone": "subln", "d_ff": 3072}
    routing = {"top_k": 2, "experts": 32, "router": "xmoe_torchscale"}
    xmoe = model({"heads": 1, "d_expert": 3072, **routing}, **p1)
    mhmoe = model({"heads": 4, "d_expert": 12_096, **routing}, **p1)
    comparisons = compare_models(mhmoe, xmoe)
    assert comparisons["multiply-adds of expert layers"].ratio == pytest.approx(130 / 32, rel=0.02)
    assert comparisons["parameters"].ratio == pytest.approx(1.0, abs=0.003)
