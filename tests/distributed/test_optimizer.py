import pytest

from mhmoe_ray.distributed.optimizer import build_optimizer
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
