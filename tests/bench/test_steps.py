import pytest

from mhmoe_ray.bench import timing
from mhmoe_ray.bench.steps import SMALL_SIZE, StepCase, matched_models, measure
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.presets import Size
from mhmoe_ray.planner.sizes import compute_sizes

TINY = Size(48, 2, 64, 8, steps=10, micro_batches=2, micro_batch_size=2)
HARDWARE = timing.find_hardware("cpu")


def test_models_at_half_width_have_follow_up_papers_expert_counts():
    models = {name: spec.model for name, spec in matched_models(SMALL_SIZE, [2, 3]).items()}
    assert [m.moe.experts for m in models.values()] == [8, 40, 96]
    assert [m.moe.top_k for m in models.values()] == [1, 2, 3]
    plain, *other_sizes = (compute_sizes(m) for m in models.values())
    for model_sizes in other_sizes:
        assert model_sizes.parameters == pytest.approx(plain.parameters, rel=0.025)
        # Both papers match compute without counting the routers.
        assert (
            model_sizes.macs_per_token - model_sizes.router_macs_per_token
            == plain.macs_per_token - plain.router_macs_per_token
        )


@pytest.mark.long
def test_measured_step_trains():
    """A measured step is a step of training: the loss of the repeated micro-batches falls."""
    case = StepCase(matched_models(TINY, [2])["MH-MoE h 2"], HARDWARE.device)
    losses = [case.step() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.5
    assert case.trainer.step == 30


def test_models_are_compared_to_plain_model():
    figures_by_name = {f.name: f for f in measure(TINY, [2, 3], 2, HARDWARE)}
    assert list(figures_by_name) == ["SMoE", "MH-MoE h 2", "MH-MoE h 3"]
    assert figures_by_name["SMoE"].ratio_to_smoe == 1
    for f in figures_by_name.values():
        assert len(f.seconds) == 2
        assert f.ratio_to_smoe == f.median / figures_by_name["SMoE"].median
        assert f.tokens_per_second == 2 * 2 * 8 / f.median
    assert figures_by_name["MH-MoE h 2"].paper_ratio == pytest.approx(33.98 / 31.93)


def test_indivisible_width_is_refused():
    with pytest.raises(SpecError, match="48 does not split"):
        matched_models(TINY, [5])
