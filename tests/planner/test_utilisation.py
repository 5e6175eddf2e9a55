from pathlib import Path

import pytest

from mhmoe_ray.planner.sizes import flops_per_token, model_flops_utilisation
from tests.support.specs import tiny_spec


def test_utilisation_at_the_peak_rate_is_one():
    cluster = {"workers": 4, "gpus_per_worker": 1, "accelerator": {"float32_flops": 1e6, "bfloat16_flops": 4e6}}
    spec = tiny_spec(Path("/x"), cluster=cluster)
    rate = 4 * 1e6 / flops_per_token(spec.model, spec.data.seq_len).training
    assert model_flops_utilisation(spec, rate, 4) == pytest.approx(1)
    assert model_flops_utilisation(spec, rate, 2) == pytest.approx(2)
    halved = tiny_spec(Path("/x"), cluster=cluster, train={"precision": "bfloat16"})
    assert model_flops_utilisation(halved, rate, 4) == pytest.approx(1 / 4)


def test_utilisation_without_gpus_is_none():
    assert model_flops_utilisation(tiny_spec(Path("/x")), 1000.0, 1) is None
