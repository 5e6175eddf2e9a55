import pytest
import torch

from mhmoe_ray.distributed.optimizer import build_optimizer, expert_parameters, set_learning_rate
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import TrainSpec
from tests.support.specs import tiny_spec


def spec(**fields):
    return TrainSpec(steps=100, micro_batches=1, micro_batch_size=1, lr=1.0, min_lr=0.1, warmup_steps=10, **fields)


@pytest.mark.parametrize("backbone", ["llama", "subln"])
def test_only_matrices_decay_including_those_of_experts(backbone):
    model = Decoder(tiny_spec(model={"backbone": backbone}).model)
    decay_of = {
        p: g["weight_decay"] for g in build_optimizer(model, spec(weight_decay=0.1)).param_groups for p in g["params"]
    }
    decayed_names = {name for name, parameter in model.named_parameters() if decay_of[parameter] == 0.1}
    assert decayed_names == {name for name, _ in model.named_parameters() if "bias" not in name and "norm" not in name}
    assert {decay_of[parameter] for name, parameter in model.named_parameters() if name not in decayed_names} == {0}


def test_a_ratio_multiplies_the_updates_of_experts_alone():
    model = Decoder(tiny_spec().model)
    updates = {}
    for ratio in (1.0, 0.25):
        optimizer = build_optimizer(model, spec(expert_lr_ratio=ratio))
        set_learning_rate(optimizer, 2.0**-10)
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter)
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        updates[ratio] = {name: (1 - parameter).max().item() for name, parameter in model.named_parameters()}
    expert_names = set(expert_parameters(model))
    assert expert_names
    for name, update in updates[1.0].items():
        assert update > 2.0**-11
        assert updates[0.25][name] == pytest.approx(update * (0.25 if name in expert_names else 1), rel=1e-3)


def test_a_ratio_without_experts_is_refused():
    with pytest.raises(ValueError, match="expert_lr_ratio is for a model with experts"):
        tiny_spec(model={"moe": None}, train={"expert_lr_ratio": 0.5})
