"""Tests of the objective of vision models: a step on any number of ranks, the draws of samples, and the adaptive k."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mhmoe_ray.families.vision.data.columns import samples_in_row, stream_columns
from tests.support.ranks import run_ranks
from tests.support.visions import VIT, micro_batch_samples, task_samples, vision_spec
from tests.train.jobs import build_trainer, full_gradients, full_tensors

ADAPTIVE = {"largest": 3, "interval": 1, "patience": 1, "batches": 2}


def rank_batches(spec, trainer, step):
    """Return this rank's micro-batches of a step."""
    m, mesh = spec.train.micro_batches, trainer.mesh
    numbers = range(step * m + mesh.rank, (step + 1) * m, mesh.world_size)
    rows = [stream_columns([micro_batch_samples(spec, number)]) for number in numbers]
    return [trainer.objective.receive(row)[1] for row in rows]


def held_out_samples(spec):
    # The numbers of held-out samples do not divide evenly over ranks.
    return {
        part.name: task_samples(spec, part._replace(samples=7), 900 + number) for number, part in enumerate(spec.parts)
    }


def train_and_validate(spec, steps=2):
    """Train from step 0, and return the losses of each step, the first gradients, the weights, and a validation."""
    trainer = build_trainer(spec)
    losses, gradients, top_k = [], {}, []
    for step in range(steps):
        sums = trainer.accumulate(rank_batches(spec, trainer, step))
        if step == 0:
            gradients = full_gradients(trainer)
        trainer.update(sums)
        part_sums_P2 = sums.part_sums_P2
        if trainer.mesh.world_size > 1:
            dist.all_reduce(part_sums_P2)
        losses.append(part_sums_P2)
        trainer.objective.adapt(held_out_samples(spec), step + 1)
        top_k.append(trainer.objective.adaptive.top_k if trainer.objective.adaptive else None)
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": full_tensors(trainer.strategy.checkpoint_weights()),
        "validation": trainer.objective.validate(held_out_samples(spec)),
        "top_k": top_k,
    }


NOISY = {"model__moe__noise": 1.0, "model__moe__balance": "importance_load", "model__vision__adaptive": ADAPTIVE}


@pytest.fixture(scope="module")
def single_rank_result():
    [result] = run_ranks(1, train_and_validate, vision_spec(**NOISY))
    return result


@pytest.mark.parametrize(
    ("workers", "cluster"),
    [(2, {"ep": 1}), (2, {"ep": 2}), (2, {"ep": 2, "strategy": "fsdp"}), (2, {"strategy": "zero2"})],
    ids=["2-ranks", "ep-2", "fsdp-ep-2", "zero2"],
)
def test_ranks_train_as_one_does(single_rank_result, workers, cluster):
    """A detector's proposals could differ only where scores are equal, which does not happen with these samples."""
    results = run_ranks(workers, train_and_validate, vision_spec(**NOISY, cluster={"workers": workers, **cluster}))
    for result in results:
        torch.testing.assert_close(result["losses"][0], single_rank_result["losses"][0], rtol=1e-5, atol=1e-5)
        assert result["gradients"].keys() == single_rank_result["gradients"].keys()
        for name, gradient in single_rank_result["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        validation, expected = result["validation"], single_rank_result["validation"]
        assert validation.targets == expected.targets == 7 + 5 * 7
        assert validation.loss == pytest.approx(expected.loss, rel=1e-3)
        assert result["top_k"] == single_rank_result["top_k"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_train_the_trunk_of_adamv_as_one_does(strategy):
    [expected] = run_ranks(1, train_and_validate, vision_spec(**VIT))
    cluster = {"workers": 2, "ep": 2, "strategy": strategy}
    for result in run_ranks(2, train_and_validate, vision_spec(**VIT, cluster=cluster)):
        torch.testing.assert_close(result["losses"][0], expected["losses"][0], rtol=1e-5, atol=1e-5)
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_heads_compute_in_float32_where_blocks_are_gathered_in_bfloat16():
    options = {"train__precision": "bfloat16"}
    cluster = {"workers": 2, "ep": 2, "strategy": "fsdp", "gather_precision": "bfloat16"}
    [expected] = run_ranks(1, train_and_validate, vision_spec(**options))
    for result in run_ranks(2, train_and_validate, vision_spec(**options, cluster=cluster)):
        torch.testing.assert_close(result["losses"][0], expected["losses"][0], rtol=0.05, atol=0.05)


def test_losses_of_a_step_are_means_over_images_times_the_weights_of_tasks():
    spec = vision_spec()
    trainer = build_trainer(spec)
    assert trainer.objective.weights == (1.0, *[0.5] * 5)
    sums = trainer.accumulate(rank_batches(spec, trainer, 0))
    assert sums.part_sums_P2[:, 1].tolist() == [12, *[8] * 5]
    means = sums.part_sums_P2[:, 0] / sums.part_sums_P2[:, 1]
    expected = float(means[0] + 0.5 * means[1:].sum())
    assert trainer.objective.step_loss(0.0, 0, sums.part_sums_P2) == pytest.approx(expected)


def test_the_digest_covers_images_classes_boxes_and_masks():
    spec = vision_spec()
    objective = build_trainer(spec).objective
    samples = micro_batch_samples(spec, 4)
    digest = objective.receive(stream_columns([samples]))[0]
    assert objective.receive(stream_columns([samples]))[0] == digest
    changed = []
    for change in ("images", "classes"):
        task = samples["classify"]
        array = getattr(task, change).copy()
        array.flat[0] ^= 1
        changed.append({**samples, "classify": task._replace(**{change: array})})
    detect = samples["detect"]
    number = next(n for n, objects in enumerate(detect.objects) if len(objects.boxes))
    for field in ("boxes", "classes", "masks"):
        objects = list(detect.objects)
        array = getattr(objects[number], field).copy()
        array.flat[-1] = not array.flat[-1] if field == "masks" else array.flat[-1] + 1
        objects[number] = objects[number]._replace(**{field: array})
        changed.append({**samples, "detect": detect._replace(objects=objects)})
    digests = {objective.receive(stream_columns([s]))[0] for s in changed}
    assert len(digests) == 5
    assert digest not in digests


def test_samples_pass_the_stream_unchanged():
    spec = vision_spec()
    micro_batches = [micro_batch_samples(spec, number) for number in range(3)]
    columns = stream_columns(micro_batches)
    for number, expected in enumerate(micro_batches):
        row = {name: column[number : number + 1] for name, column in columns.items()}
        for name, samples in samples_in_row(row, spec.parts).items():
            assert all(np.array_equal(a, b) for a, b in zip(samples.arrays(), expected[name].arrays(), strict=True))


def test_the_adaptive_rule_changes_the_model_and_its_state_is_restored():
    spec = vision_spec(model__vision__adaptive={**ADAPTIVE, "first_loss": 1e-6, "first_step": 0})
    trainer, restored = build_trainer(spec), build_trainer(spec)
    samples = held_out_samples(spec)
    assert trainer.objective.adapt(samples, 1) == []
    # No validation has a loss below first_loss, so k rises at the first validation after the patience.
    assert trainer.objective.adapt(samples, 2) == [("classify", 3), ("detect", 3)]
    assert trainer.model.top_k == [3, 3]
    restored.objective.load_state(trainer.objective.state)
    assert restored.model.top_k == [3, 3]
    assert (
        restored.objective.adapt(samples, 3) == trainer.objective.adapt(samples, 3) == [("classify", 2), ("detect", 2)]
    )
