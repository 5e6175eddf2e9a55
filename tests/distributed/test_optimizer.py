import pytest

from mhmoe_ray.distributed.optimizer import build_optimizer, learning_rate
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import TrainSpec
from tests.specs import tiny_spec


def spec(**fields):
    return TrainSpec(steps=100, micro_batches=1, micro_batch_size=1, lr=1.0, min_lr=0.1, warmup_steps=10, **fields)


def test_learning_rate_rises_to_its_peak_and_falls_to_its_minimum():
    rates = [learning_rate(spec(), step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_learning_rate_equals_that_in_the_first_papers_log():
    """The rate is 6e-4 with warm-up 375, falling to 0 at step 300,000; the log of step 14,050 says 5.72616e-4."""
    p1 = TrainSpec(steps=300_000, micro_batches=1, micro_batch_size=1, lr=6e-4, min_lr=0, warmup_steps=375)
    assert learning_rate(p1, 14_050) == pytest.approx(5.72616e-4, rel=1e-5)


@pytest.mark.parametrize("backbone", ["llama", "subln"])
def test_only_matrices_decay_including_those_of_experts(backbone):
    model = Decoder(tiny_spec(model={"backbone": backbone}).model)
    decay_of = {
        p: g["weight_decay"] for g in build_optimizer(model, spec(weight_decay=0.1)).param_groups for p in g["params"]
    }
    decayed_names = {name for name, parameter in model.named_parameters() if decay_of[parameter] == 0.1}
    assert decayed_names == {name for name, _ in model.named_parameters() if "bias" not in name and "norm" not in name}
    assert {decay_of[parameter] for name, parameter in model.named_parameters() if name not in decayed_names} == {0}
