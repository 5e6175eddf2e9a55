"""Tests of a single optimizer step, applied or skipped."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.distributed.optimizer import expert_parameters
from mhmoe_ray.errors import JobError
from mhmoe_ray.spec.train import SpikeSpec
from mhmoe_ray.train.spikes import spike_reason
from tests.support.ranks import run_ranks
from tests.support.runs import new_run
from tests.support.specs import TINY, tiny_spec
from tests.train.jobs import build_trainer, full_tensors, rank_batches, save_checkpoint, train


def test_non_finite_gradient_is_an_error_and_changes_nothing():
    spec = tiny_spec()
    trainer = build_trainer(spec)
    sums = trainer.accumulate(rank_batches(spec, 0, trainer))
    previous_weights = {name: weight.clone() for name, weight in trainer.strategy.checkpoint_weights().items()}
    next(trainer.model.parameters()).grad.view(-1)[0] = torch.inf
    with pytest.raises(JobError, match="gradient of step 1 is not finite"):
        trainer.update(sums)
    assert trainer.step == 0
    assert all(
        torch.equal(weight, previous_weights[name]) for name, weight in trainer.strategy.checkpoint_weights().items()
    )


def train_with_skipped_step(spec):
    """Train six steps, the third with an infinite gradient, and check that the third changes no weight.

    It must not even change the biases of routers, which move without gradients. Return for each step whether its update
    was applied, the number of skipped steps, and for each step whether the gradient norm was finite.
    """
    trainer = build_trainer(spec)
    updates, previous_weights = [], {}
    for step in range(6):
        sums = trainer.accumulate(rank_batches(spec, step, trainer))
        if step == 2:
            make_gradient_infinite(trainer)
            previous_weights = full_tensors(trainer.strategy.checkpoint_weights())
            assert any("bias_E" in name and t.any() for name, t in previous_weights.items())
        updates.append(trainer.update(sums))
        if step == 2:
            assert all(
                torch.equal(t, previous_weights[name])
                for name, t in full_tensors(trainer.strategy.checkpoint_weights()).items()
            )
    return [u.applied for u in updates], trainer.skipped, [math.isfinite(u.norm) for u in updates]


def loss_with_autocast_flag(spec, cuda_autocast):
    """Return the sum of losses of a step on the CPU, computed with autocast for CUDA switched on or off."""
    torch.set_autocast_enabled("cuda", cuda_autocast)
    trainer = build_trainer(spec)
    return trainer.accumulate(rank_batches(spec, 0, trainer)).loss


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_deepspeed_keeps_autocast_on(strategy):
    """A loss in bfloat16 differs from the one in float32, and does not depend on the switch of autocast for CUDA."""
    pytest.importorskip("deepspeed")
    float32_spec, bfloat16_spec = (
        tiny_spec(cluster={"workers": 2, "ep": 1, "strategy": strategy}, train={"precision": precision})
        for precision in ("float32", "bfloat16")
    )
    plain_losses, cuda_losses = (run_ranks(2, loss_with_autocast_flag, bfloat16_spec, flag) for flag in (False, True))
    assert cuda_losses == plain_losses != run_ranks(2, loss_with_autocast_flag, float32_spec, False)


def make_gradient_infinite(trainer):
    """Put an infinite value into a gradient that the optimizer reads."""
    if trainer.spec.cluster.strategy == "zero2":
        [first_gradient, *_] = trainer.strategy.engine.optimizer.averaged_gradients[0]
        first_gradient.view(-1)[0] = torch.inf
        return
    gradient = next(p.grad for p in trainer.model.parameters() if p.grad is not None)
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    local.view(-1)[0] = torch.inf


@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (2, "zero2")])
def test_step_with_non_finite_gradient_is_skipped(workers, strategy):
    model = {"moe": {**TINY["model"]["moe"], "bias_rate": 0.01}}
    cluster = {"workers": workers, "ep": 1, "strategy": strategy}
    spec = tiny_spec(cluster=cluster, model=model, train={"on_nonfinite": "skip"})
    for applied, skipped, finite in run_ranks(workers, train_with_skipped_step, spec):
        assert applied == finite == [True, True, False, True, True, True]
        assert skipped == 1


def test_checkpoint_after_skipped_step_continues_bit_identically(tmp_path):
    """AdamW's count of updates is restored, which is lower than the step after a skipped step."""
    spec, run = new_run(tmp_path, {"workers": 1}, train={"on_nonfinite": "skip"})
    trainer = build_trainer(spec)
    train(spec, trainer, 1)
    sums = trainer.accumulate(rank_batches(spec, 1, trainer))
    make_gradient_infinite(trainer)
    assert not trainer.update(sums).applied
    train(spec, trainer, 1)
    save_checkpoint(run, trainer)
    checkpoint, manifest, _ = newest_checkpoint(run)
    resumed = build_trainer(spec)
    restore(resumed, checkpoint, manifest)
    assert (resumed.step, resumed.skipped) == (3, 1)
    for _ in range(2):
        for current_trainer in (trainer, resumed):
            train(spec, current_trainer, 1)
        actual, expected = (
            source_trainer.strategy.checkpoint_weights() | source_trainer.strategy.checkpoint_moments()
            for source_trainer in (resumed, trainer)
        )
        assert all(torch.equal(actual[name], t) for name, t in expected.items())


def test_more_than_ten_consecutive_skipped_steps_stop_the_run(tmp_path):
    spec, run = new_run(tmp_path, {"workers": 1}, train={"on_nonfinite": "skip"})
    trainer = build_trainer(spec)
    for step in range(10):
        if step == 7:
            save_checkpoint(run, trainer)
            checkpoint, manifest, _ = newest_checkpoint(run)
            trainer = build_trainer(spec)
            restore(trainer, checkpoint, manifest)
        sums = trainer.accumulate(rank_batches(spec, 0, trainer))
        make_gradient_infinite(trainer)
        trainer.update(sums)
    sums = trainer.accumulate(rank_batches(spec, 0, trainer))
    make_gradient_infinite(trainer)
    with pytest.raises(JobError, match=r"gradient of step 11 is not finite .*, and the 10 steps before it"):
        trainer.update(sums)


class Casts(TorchDispatchMode):
    """Mode that counts casts to bfloat16 by the name of the parameter that is cast; other tensors count as None."""

    def __init__(self, parameters):
        super().__init__()
        self.addresses = {p.data_ptr(): name for name, p in parameters}
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_to_copy" and kwargs.get("dtype") == torch.bfloat16:
            self.counts[self.addresses.get(args[0].data_ptr())] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_weights_are_cast_once_in_a_step(recompute):
    """The step has four micro-batches. A recomputation reads the casts of its forward, too."""
    spec = tiny_spec(train={"precision": "bfloat16", "micro_batches": 4, "recompute": recompute})
    trainer = build_trainer(spec)
    with Casts(trainer.model.named_parameters()) as casts:
        trainer.accumulate(rank_batches(spec, 0, trainer))
    del casts.counts[None]  # the casts of activations
    assert set(casts.counts.values()) == {1}
    assert {name for name in casts.counts if ".experts." in name} == set(expert_parameters(trainer.model))
    assert all(layer.experts.step_casts is None for layer in trainer.model.moe_layers())


def step_of_parts(spec):
    """Return this rank's sums of a step, and the loss of each token of its micro-batches with the targets' mask."""
    trainer = build_trainer(spec)
    batches = rank_batches(spec, 0, trainer)
    with torch.no_grad():
        losses = [trainer.forward(batch).loss.token_BT for batch in batches]
    return trainer.accumulate(batches), torch.stack(losses), torch.stack([batch.counts_BT for batch in batches])


@pytest.mark.parametrize("sections", [{}, {"data": {"packing": "best_fit"}}, {"train": {"loss_chunk_rows": 5}}])
def test_the_loss_of_each_part_is_that_of_its_samples(sections):
    sources = {"web": {"path": "web"}, "books": {"path": "books"}}
    parts = {
        "a": {"sources": ["web"], "micro_batch_size": 3},
        "b": {"sources": ["books"], "micro_batch_size": 1},
    }
    data, train = sections.get("data", {}), sections.get("train", {})
    spec = tiny_spec(
        data={"sources": sources, "parts": parts, **data},
        train={"micro_batch_size": 4, **train},
        cluster={"workers": 2},
    )
    for sums, loss_MBT, counts_MBT in run_ranks(2, step_of_parts, spec):
        for part, samples in enumerate((slice(0, 3), slice(3, 4))):
            expected = [t[:, samples].sum(dtype=torch.float64) for t in (loss_MBT, counts_MBT)]
            torch.testing.assert_close(sums.part_sums_P2[part], torch.stack(expected), rtol=1e-6, atol=0)
        assert sums.part_sums_P2[:, 0].sum() == pytest.approx(sums.loss, rel=1e-6)


def test_a_step_without_parts_has_no_losses_of_parts():
    spec = tiny_spec()
    trainer = build_trainer(spec)
    assert trainer.accumulate(rank_batches(spec, 0, trainer)).part_sums_P2.shape == (0, 2)


def train_with_spikes(spec, run=None):
    """Train 24 steps, with gradients a thousand times too large at three; return the skipped steps and the weights.

    With a run, it saves, and restores another trainer, before the first and between two spikes.
    """
    trainer, skipped_steps = build_trainer(spec), []
    for step in range(24):
        if run and step in (5, 8):
            save_checkpoint(run, trainer)
            checkpoint, manifest, _ = newest_checkpoint(run)
            trainer = build_trainer(spec)
            restore(trainer, checkpoint, manifest)
        sums = trainer.accumulate(rank_batches(spec, step, trainer))
        if step in (6, 9, 23):
            for parameter in trainer.model.parameters():
                parameter.grad.mul_(1000)
        update = trainer.update(sums)
        assert update.applied == (update.spike is None)
        skipped_steps += [] if update.applied else [step]
    return skipped_steps, full_tensors(trainer.strategy.checkpoint_weights())


SPIKES = {"spikes": {"deviations": 8, "window": 5}}


@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp")])
def test_spikes_are_skipped_on_any_number_of_workers(workers, strategy):
    spec = tiny_spec(cluster={"workers": workers, "ep": 1, "strategy": strategy}, train=SPIKES)
    assert all(skipped == [6, 9, 23] for skipped, _ in run_ranks(workers, train_with_spikes, spec))


def test_checkpoint_keeps_what_spikes_are_compared_with(tmp_path):
    """A checkpoint before and one between the spikes change neither the skipped steps nor the weights."""
    spec, run = new_run(tmp_path, {"workers": 1}, train=SPIKES)
    skipped_steps, weights = train_with_spikes(spec)
    resumed_steps, resumed_weights = train_with_spikes(spec, run)
    assert resumed_steps == skipped_steps == [6, 9, 23]
    assert all(torch.equal(resumed_weights[name], t) for name, t in weights.items())


def test_a_step_is_a_spike_only_with_enough_steps_before_it():
    spec = SpikeSpec(deviations=2, window=3)
    recent_updates = [[2.0, 1.0], [3.0, 1.0], [4.0, 1.0]]  # losses of mean 3 and deviation 1
    assert spike_reason(spec, recent_updates, 5.0, 1.0) is None
    assert spike_reason(spec, recent_updates, 5.1, 1.0) == "its loss of 5.1 is above 5"
    assert spike_reason(spec, recent_updates, 3.0, 1.5) == "its gradient norm of 1.5 is above 1"
    assert spike_reason(spec, recent_updates[1:], 9.0, 9.0) is None
