"""Tests of the objectives of encoders: losses on any number of ranks, the weights of losses, and validation."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mhmoe_ray.families.encoder.data.batches import BatchMaker, normalized_patches
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.train.objectives.base import array_digest
from tests.support.encoders import (
    ENCODER,
    QUESTIONS,
    SMEAR,
    encoder_spec,
    micro_batch_samples,
    part_samples,
    stream_rows,
)
from tests.support.ranks import run_ranks
from tests.train.jobs import build_trainer, full_gradients, full_tensors

SMEAR_WITH_NOISE = {**SMEAR, "expert_dropout": 0.1}


def rank_batches(spec, trainer, step):
    """Return this rank's micro-batches of a step."""
    m, mesh = spec.train.micro_batches, trainer.mesh
    numbers = range(step * m + mesh.rank, (step + 1) * m, mesh.world_size)
    return [trainer.objective.receive(stream_rows(micro_batch_samples(spec, number)))[1] for number in numbers]


def train_and_validate(spec, steps=3):
    """Train from step 0, and return the losses of each step, the first gradients, the weights, and a validation."""
    trainer = build_trainer(spec)
    losses, gradients = [], {}
    for step in range(steps):
        sums = trainer.accumulate(rank_batches(spec, trainer, step))
        if step == 0:
            gradients = full_gradients(trainer)
        trainer.update(sums)
        part_sums_P2 = sums.part_sums_P2
        if trainer.mesh.world_size > 1:
            dist.all_reduce(part_sums_P2)
        losses.append(part_sums_P2)
    # The numbers of held-out samples do not divide evenly over ranks.
    held_out = {part.name: part_samples(spec, part._replace(samples=7), 900 + i) for i, part in enumerate(spec.parts)}
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": full_tensors(trainer.strategy.checkpoint_weights()),
        "validation": trainer.objective.validate(held_out),
    }


@pytest.fixture(scope="module")
def single_rank_result():
    [result] = run_ranks(1, train_and_validate, encoder_spec())
    return result


@pytest.mark.parametrize(
    ("workers", "cluster"),
    [(2, {"ep": 1}), (2, {"ep": 2}), (4, {"ep": 2}), (2, {"ep": 2, "strategy": "fsdp"}), (2, {"strategy": "zero2"})],
    ids=["2-ranks", "ep-2", "4-ranks-ep-2", "fsdp-ep-2", "zero2"],
)
def test_ranks_train_as_one_does(single_rank_result, workers, cluster):
    check_results_of_ranks(single_rank_result, encoder_spec(cluster={"workers": workers, **cluster}), workers)


@pytest.fixture(scope="module")
def smear_result():
    [result] = run_ranks(1, train_and_validate, encoder_spec(model__moe=SMEAR_WITH_NOISE))
    return result


@pytest.mark.parametrize(
    "cluster",
    [{}, {"strategy": "fsdp", "shard_experts": True}, {"strategy": "zero2"}],
    ids=["ddp", "fsdp-sharded-experts", "zero2"],
)
def test_ranks_average_experts_as_one_does(smear_result, cluster):
    """Router smear, which averages experts, with expert dropout trains the same on two ranks as on one.

    With fsdp, each rank holds a shard of each layer's experts.
    """
    check_results_of_ranks(
        smear_result, encoder_spec(model__moe=SMEAR_WITH_NOISE, cluster={"workers": 2, **cluster}), 2
    )


@pytest.mark.parametrize("cluster", [{"ep": 2}, {"ep": 2, "strategy": "fsdp"}], ids=["ddp", "fsdp"])
def test_ranks_learn_answers_as_one_does(cluster):
    [expected] = run_ranks(1, train_and_validate, encoder_spec(**QUESTIONS))
    check_results_of_ranks(expected, encoder_spec(**QUESTIONS, cluster={"workers": 2, **cluster}), 2)


def check_results_of_ranks(expected, spec, workers):
    """Check that all ranks have the results of a single one."""
    for result in run_ranks(workers, train_and_validate, spec):
        for losses, expected_losses in zip(result["losses"], expected["losses"], strict=True):
            torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-3, atol=2e-6, msg=name)
        assert result["validation"].targets == expected["validation"].targets
        assert result["validation"].loss == pytest.approx(expected["validation"].loss, rel=1e-4)
        assert result["validation"].part_losses == pytest.approx(expected["validation"].part_losses, rel=1e-4)


def test_the_loss_of_a_step_is_the_weighted_sum_of_means(single_rank_result):
    """Each loss is averaged over all its targets in the step and multiplied by its weight; the results are summed."""
    spec = encoder_spec()
    trainer = build_trainer(spec)
    batches = rank_batches(spec, trainer, 0)
    outputs = [trainer.model(batch) for batch in batches]
    weights = {"pairs_image": 0.5, "pairs_text": 0.5}
    total = sum(
        weights.get(name, 1)
        * sum(output.losses[i].sum for output in outputs)
        / sum(len(output.losses[i].value_I) for output in outputs)
        for i, name in enumerate(spec.loss_names)
    )
    balance = sum(routing.balance_loss for output in outputs for routing in output.routing) / len(batches)
    (total + spec.model.moe.balance_weight * balance).backward()
    for name, parameter in trainer.model.named_parameters():
        expected = single_rank_result["gradients"][name]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=2e-6, msg=name)
    [sums] = single_rank_result["losses"][:1]
    means = dict(zip(spec.loss_names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
    expected_loss = sum(weights.get(name, 1) * mean for name, mean in means.items())
    assert trainer.objective.step_loss(0, 0, sums) == pytest.approx(expected_loss)
    assert list(means) == ["texts", "images", "pairs_image", "pairs_text", "match"]


def test_a_matching_part_is_validated_in_whole_micro_batches(single_rank_result):
    """Six of seven pairs fill micro-batches of three; the last is left out, as its loss alone would always be 0."""
    trainer = build_trainer(encoder_spec())
    part = trainer.spec.parts[3]
    samples = {"match": part_samples(trainer.spec, part._replace(samples=7), 5)}
    assert trainer.objective.validate(samples).targets == 6
    few_samples = {"match": part_samples(trainer.spec, part._replace(samples=2), 5)}
    assert trainer.objective.validate(few_samples).targets == 2


def test_digests_depend_on_every_column():
    samples = micro_batch_samples(encoder_spec(), 0)._replace(labels=np.zeros((1, 10), np.int64))
    digests = {array_digest(samples)}
    for name in EncoderSamples._fields:
        column = getattr(samples, name).copy()
        column.flat[-1] ^= True
        digests.add(array_digest(samples._replace(**{name: column})))
    assert len(digests) == 7


def test_normalized_patches_have_mean_0_and_deviation_1():
    patches = torch.rand(5, 48) * torch.arange(1, 6)[:, None]
    normalized = normalized_patches(patches)
    torch.testing.assert_close(normalized.mean(1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(normalized.std(1), torch.ones(5), atol=1e-3, rtol=0)
    assert torch.equal(normalized_patches(torch.full((1, 48), 0.7)).round(decimals=3), torch.zeros(1, 48))


def test_targets_of_a_codebook_are_its_nearest_entries():
    spec = encoder_spec(model__encoder__image_targets="codebook", model__encoder__codebook_size=6)
    codebook = torch.randn(6, 48)
    samples = micro_batch_samples(spec, 0)
    batch = BatchMaker(spec.model, torch.device("cpu"), codebook.numpy()).make(spec.parts, samples)
    pixel_batch = BatchMaker(encoder_spec().model, torch.device("cpu")).make(spec.parts, samples)
    distances = (pixel_batch.patch_target_I[:, None] - codebook).square().sum(-1)
    assert torch.equal(batch.patch_target_I, distances.argmin(1))


def test_an_encoder_that_predicts_no_patches_needs_no_codebook():
    """The encoder starts from one that learned a codebook, and trains only on texts and on matching pairs."""
    names = ("texts", "match")
    parts = {name: ENCODER["data"]["parts"][name] for name in names}
    spec = encoder_spec(
        start={"from": "pretrained"},
        data__parts=parts,
        data__sources={name: ENCODER["data"]["sources"][name] for name in ("captions", "matched")},
        train__micro_batch_size=6,
        model__encoder__image_targets="codebook",
        model__encoder__codebook_size=6,
    )
    assert not spec.has_codebook
    model = build_model(spec.model)
    init_weights(model, 0)
    batch = BatchMaker(spec.model, torch.device("cpu")).make(spec.parts, micro_batch_samples(spec, 0))
    losses = model(batch).losses
    assert len(losses) == 2
    assert all(torch.isfinite(loss.sum) for loss in losses)
    sum(loss.sum for loss in losses).backward()
    assert not model.output["image"].weight.grad.any()
