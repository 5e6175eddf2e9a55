"""Tests of the moving average of the weights, against a plain loop, on every kind of mesh and over restarts."""

import pytest
import torch
from pydantic import ValidationError

from mhmoe_ray.checkpoint.load import load_model, restore
from mhmoe_ray.checkpoint.manifest import committed_checkpoints, read_manifest
from mhmoe_ray.planner.memory import checkpoint_bytes, compute_memory
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import RunSpec
from tests.support.ranks import run_ranks
from tests.support.runs import new_run
from tests.support.specs import tiny_spec
from tests.train import jobs

DECAY, STEPS = 0.5, 6
MESHES = [
    {"workers": 1},
    {"workers": 2, "ep": 2},
    {"workers": 4, "ep": 2, "strategy": "fsdp", "shard_experts": True},
    {"workers": 4, "ep": 4, "strategy": "fsdp"},
    {"workers": 2, "ep": 1, "strategy": "fsdp"},
]


def average_spec(decay=DECAY, **cluster) -> RunSpec:
    spec = tiny_spec()
    train = {**spec.train.model_dump(), "ema_decay": decay}
    return RunSpec.model_validate({**spec.model_dump(by_alias=True), "train": train, "cluster": cluster})


def average_in_a_loop(spec: RunSpec) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train, and return the averages of a plain loop over the full weights, in float64, and those of the trainer."""
    trainer = jobs.build_trainer(spec)
    expected = {name: t.double() for name, t in jobs.full_tensors(trainer.strategy.checkpoint_weights()).items()}
    for update in range(1, STEPS + 1):
        jobs.train(spec, trainer, 1)
        decay = min(spec.train.ema_decay, (1 + update) / (10 + update))
        for name, weight in jobs.full_tensors(trainer.strategy.checkpoint_weights()).items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.double()
    averages = jobs.full_tensors(trainer.strategy.checkpoint_averages())
    return {name: expected[name] for name in averages}, averages


@pytest.mark.parametrize("cluster", MESHES, ids=str)
def test_averages_are_those_of_a_plain_loop(cluster):
    for expected, averages in run_ranks(cluster["workers"], average_in_a_loop, average_spec(**cluster)):
        assert expected.keys() == averages.keys()
        for name, average in averages.items():
            torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)


def continue_with_averages(spec: RunSpec, checkpoint, steps: int):
    """Continue from a checkpoint if there is one, and return the weights and averages after further steps."""
    trainer = jobs.build_trainer(spec)
    if checkpoint:
        restore(trainer, checkpoint, read_manifest(checkpoint))
    jobs.train(spec, trainer, steps)
    strategy = trainer.strategy
    return tuple(map(jobs.full_tensors, (strategy.checkpoint_weights(), strategy.checkpoint_averages())))


def test_a_checkpoint_has_averages_for_readers_and_continues_on_every_mesh(tmp_path):
    spec, run = new_run(tmp_path, {"workers": 1}, train=average_spec().train.model_dump())
    run_ranks(1, jobs.train_and_save, spec, run.path, 3)
    [checkpoint] = committed_checkpoints(run)
    [(weights, averages)] = run_ranks(1, continue_with_averages, spec, None, 3)
    model, manifest = load_model(checkpoint)
    assert manifest.is_averaged
    for name, tensor in model.named_tensors().items():
        assert torch.equal(tensor, averages.get(name, weights[name])), name
    assert not all(torch.equal(averages[name], weights[name]) for name in averages)
    [expected] = run_ranks(1, continue_with_averages, spec, None, STEPS)
    for cluster in MESHES:
        for result in run_ranks(cluster["workers"], continue_with_averages, average_spec(**cluster), checkpoint, 3):
            for tensors, expected_tensors in zip(result, expected, strict=True):
                for name, tensor in tensors.items():
                    if cluster["workers"] == 1:
                        assert torch.equal(tensor, expected_tensors[name]), name
                    torch.testing.assert_close(tensor, expected_tensors[name], rtol=0, atol=1e-3)


def test_averages_begin_with_the_weights_of_a_checkpoint_without_them(tmp_path):
    spec, run = new_run(tmp_path, {"workers": 1})
    run_ranks(1, jobs.train_and_save, spec, run.path, 3)
    [checkpoint] = committed_checkpoints(run)
    [(weights, averages)] = run_ranks(1, continue_with_averages, average_spec(), checkpoint, 0)
    assert all(torch.equal(average, weights[name]) for name, average in averages.items())


def test_validation_uses_averages_and_leaves_the_weights():
    spec = average_spec()
    trainer = jobs.build_trainer(spec)
    jobs.train(spec, trainer, 3)
    weights, averages = ({n: t.clone() for n, t in tensors.items()} for tensors in _weights_and_averages(trainer))
    with trainer.strategy.averaged_weights():
        assert all(torch.equal(t, averages.get(n, t)) for n, t in trainer.strategy.checkpoint_weights().items())
    for old_tensors, tensors in zip((weights, averages), _weights_and_averages(trainer), strict=True):
        assert all(torch.equal(old_tensors[name], t) for name, t in tensors.items())


def _weights_and_averages(trainer):
    return trainer.strategy.checkpoint_weights(), trainer.strategy.checkpoint_averages()


def test_the_plan_counts_the_average():
    spec, plain_spec = average_spec(), tiny_spec()
    size = 4 * compute_sizes(spec.model).parameters
    assert compute_memory(spec).moments == compute_memory(plain_spec).moments + size
    assert checkpoint_bytes(spec) == checkpoint_bytes(plain_spec) + size


@pytest.mark.parametrize(
    ("decay", "strategy", "message"), [(0.9, "zero1", "train.ema_decay needs"), (1.0, "ddp", "less than 1")]
)
def test_wrong_averages_are_one_line(decay, strategy, message):
    with pytest.raises(ValidationError, match=message):
        average_spec(decay, workers=2, strategy=strategy)
