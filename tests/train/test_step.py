"""One optimizer step."""

import pytest
import torch

from mhmoe_ray.errors import JobError
from tests.specs import tiny_spec
from tests.train.jobs import batches, trainer_of


def test_a_gradient_that_is_not_finite_changes_nothing():
    spec = tiny_spec()
    trainer = trainer_of(spec)
    trainer.accumulate(batches(spec, 0, trainer))
    before = {name: weight.clone() for name, weight in trainer.strategy.weights().items()}
    next(trainer.model.parameters()).grad.view(-1)[0] = torch.inf
    with pytest.raises(JobError, match="gradient of step 1 is not finite"):
        trainer.update()
    assert trainer.step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.strategy.weights().items())
