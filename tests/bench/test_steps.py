import pytest

from mhmoe_ray.bench import timing
from mhmoe_ray.bench.steps import SMALL, Case, matched_models, measure
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.presets import Size
from mhmoe_ray.planner.sizes import sizes

TINY = Size(48, 2, 64, 8, steps=10, micro_batches=2, micro_batch_size=2)
WHERE = timing.find("cpu")


def test_at_half_of_the_follow_up_papers_width_models_have_its_numbers_of_experts():
    models = {name: spec.model for name, spec in matched_models(SMALL, [2, 3]).items()}
    assert [m.moe.experts for m in models.values()] == [8, 40, 96]
    assert [m.moe.top_k for m in models.values()] == [1, 2, 3]
    plain, *others = (sizes(m) for m in models.values())
    for other in others:
        assert other.parameters == pytest.approx(plain.parameters, rel=0.025)
        # Both papers leave routers out where they match compute.
        assert other.macs_per_token - other.router_macs_per_token == plain.macs_per_token - plain.router_macs_per_token


@pytest.mark.long
def test_steps_are_trainings_own():
    """A measured step is a step of training: repeated micro-batches are learnt by heart, and the loss falls."""
    case = Case(matched_models(TINY, [2])["MH-MoE h 2"], WHERE.device)
    losses = [case.step() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.5
    assert case.trainer.step == 30


def test_models_take_turns_and_are_compared_to_the_plain_one():
    found = {f.name: f for f in measure(TINY, [2, 3], 2, WHERE)}
    assert list(found) == ["SMoE", "MH-MoE h 2", "MH-MoE h 3"]
    assert found["SMoE"].to_smoe == 1
    for f in found.values():
        assert len(f.seconds) == 2
        assert f.to_smoe == f.median / found["SMoE"].median
        assert f.tokens_a_second == 2 * 2 * 8 / f.median
    assert found["MH-MoE h 2"].paper == pytest.approx(33.98 / 31.93)


def test_a_width_that_does_not_split_is_refused():
    with pytest.raises(SpecError, match="48 does not split"):
        matched_models(TINY, [5])
