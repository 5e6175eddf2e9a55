"""A single optimizer step, applied or skipped."""

import math

import pytest
import torch

from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.errors import JobError
from tests.checkpoint.test_load import new_run
from tests.ranks import run_ranks
from tests.specs import TINY, tiny_spec
from tests.train.jobs import batches, save, train, trainer_of, whole


def test_a_gradient_that_is_not_finite_changes_nothing():
    spec = tiny_spec()
    trainer = trainer_of(spec)
    sums = trainer.accumulate(batches(spec, 0, trainer))
    before = {name: weight.clone() for name, weight in trainer.strategy.weights().items()}
    next(trainer.model.parameters()).grad.view(-1)[0] = torch.inf
    with pytest.raises(JobError, match="gradient of step 1 is not finite"):
        trainer.update(sums)
    assert trainer.step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.strategy.weights().items())


def skipping(spec):
    """Take six steps, the third of which has an infinite gradient on the last rank; return which of them were applied.

    It also returns the number of skipped steps, and which norms are finite. Nothing may change in a skipped step, nor
    may the biases of routers, which move without gradients.
    """
    trainer = trainer_of(spec)
    updates, held = [], {}
    for step in range(6):
        sums = trainer.accumulate(batches(spec, step, trainer))
        if step == 2:
            spoil(trainer)
            held = whole(trainer.strategy.weights())
            assert any("bias_E" in name and t.any() for name, t in held.items())
        updates.append(trainer.update(sums))
        if step == 2:
            assert all(torch.equal(t, held[name]) for name, t in whole(trainer.strategy.weights()).items())
    return [u.applied for u in updates], trainer.skipped, [math.isfinite(u.norm) for u in updates]


def losses_begun(spec, as_on_cuda):
    """Return the loss of a step that begins where autocast is on for CUDA, or is not; CUDA's flag is not the CPU's."""
    torch.set_autocast_enabled("cuda", as_on_cuda)
    trainer = trainer_of(spec)
    return trainer.accumulate(batches(spec, 0, trainer)).loss


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_does_not_switch_autocast_off(strategy):
    pytest.importorskip("deepspeed")
    whole, half = (
        tiny_spec(cluster={"workers": 2, "ep": 1, "strategy": strategy}, train={"precision": precision})
        for precision in ("float32", "bfloat16")
    )
    plain, as_on_cuda = (run_ranks(2, losses_begun, half, flag) for flag in (False, True))
    assert as_on_cuda == plain != run_ranks(2, losses_begun, whole, False)


def spoil(trainer):
    """Put an infinite value into the gradient that the optimizer will read."""
    if trainer.spec.cluster.strategy == "zero2":
        [first, *_] = trainer.strategy.engine.optimizer.averaged_gradients[0]
        first.view(-1)[0] = torch.inf
        return
    gradient = next(p.grad for p in trainer.model.parameters() if p.grad is not None)
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    local.view(-1)[0] = torch.inf


@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (2, "zero2")])
def test_a_step_whose_gradient_is_not_finite_is_skipped_where_the_spec_says_so(workers, strategy):
    model = {"moe": {**TINY["model"]["moe"], "bias_rate": 0.01}}
    cluster = {"workers": workers, "ep": 1, "strategy": strategy}
    spec = tiny_spec(cluster=cluster, model=model, train={"on_nonfinite": "skip"})
    for applied, skipped, finite in run_ranks(workers, skipping, spec):
        assert applied == finite == [True, True, False, True, True, True]
        assert skipped == 1


def test_a_checkpoint_after_a_skipped_step_goes_on_with_the_same_bits(tmp_path):
    """AdamW counts updates, of which there were fewer than steps."""
    spec, run = new_run(tmp_path, {"workers": 1}, train={"on_nonfinite": "skip"})
    trainer = trainer_of(spec)
    train(spec, trainer, 1)
    sums = trainer.accumulate(batches(spec, 1, trainer))
    spoil(trainer)
    assert not trainer.update(sums).applied
    train(spec, trainer, 1)
    save(run, trainer)
    checkpoint, manifest, _ = newest_checkpoint(run)
    resumed = trainer_of(spec)
    restore(resumed, checkpoint, manifest)
    assert (resumed.step, resumed.skipped) == (3, 1)
    for _ in range(2):
        for each in (trainer, resumed):
            train(spec, each, 1)
        found, expected = (each.strategy.weights() | each.strategy.moments() for each in (resumed, trainer))
        assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_more_than_ten_skipped_in_a_row_stop_the_run_though_it_was_restored_meanwhile(tmp_path):
    spec, run = new_run(tmp_path, {"workers": 1}, train={"on_nonfinite": "skip"})
    trainer = trainer_of(spec)
    for step in range(10):
        if step == 7:
            save(run, trainer)
            checkpoint, manifest, _ = newest_checkpoint(run)
            trainer = trainer_of(spec)
            restore(trainer, checkpoint, manifest)
        sums = trainer.accumulate(batches(spec, 0, trainer))
        spoil(trainer)
        trainer.update(sums)
    sums = trainer.accumulate(batches(spec, 0, trainer))
    spoil(trainer)
    with pytest.raises(JobError, match=r"gradient of step 11 is not finite .*, as those of the 10 steps before it"):
        trainer.update(sums)
