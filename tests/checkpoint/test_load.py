"""Checkpoints across world sizes: every weight and moment is compared by global expert id."""

import json
import shutil

import pytest
import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import MANIFEST, newest_checkpoint, read_manifest
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import create_run
from tests.ranks import run_ranks
from tests.specs import tiny_spec
from tests.train import jobs

STEPS = 3


def new_run(folder, cluster, **sections):
    """Create a run without data below the folder; return its spec and the run."""
    spec = tiny_spec(folder, cluster=cluster, **sections)
    run = create_run(spec)
    run.tokenizer_file.write_text("{}")
    spec.data.prepared.mkdir()
    (spec.data.prepared / "manifest.json").write_text("{}")
    return spec, run


def trained(folder, cluster, nodes=None, **sections):
    """Train a run for `STEPS` steps and save a checkpoint; return its spec and the run."""
    spec, run = new_run(folder, cluster, **sections)
    run_ranks(cluster["workers"], jobs.train_and_save, spec, run.path, STEPS, nodes)
    return spec, run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the checkpoint of a run that two workers saved with ep 2, and the whole state that such workers load from
    it."""
    spec, run = trained(tmp_path_factory.mktemp("run"), {"workers": 2, "ep": 2})
    checkpoint, manifest, skipped = newest_checkpoint(run)
    assert skipped == []
    assert (manifest.step, manifest.position, manifest.tokens) == (STEPS, STEPS * 8, STEPS * 8 * 16)
    return checkpoint, run_ranks(2, jobs.load_and_describe, spec, checkpoint)[0]


@pytest.mark.parametrize(("workers", "ep"), [(1, 1), (2, 1), (4, 4)])
def test_a_checkpoint_of_two_ranks_loads_on_any_number(saved, workers, ep):
    checkpoint, expected = saved
    spec = tiny_spec(cluster={"workers": workers, "ep": ep})
    for found in run_ranks(workers, jobs.load_and_describe, spec, checkpoint):
        assert (found["step"], found["tokens"]) == (STEPS, STEPS * 8 * 16)
        for part in ("weights", "moments"):
            assert found[part].keys() == expected[part].keys()
            for name, tensor in expected[part].items():
                assert torch.equal(found[part][name], tensor), f"{part} of {name}"


def test_what_was_saved_is_what_training_held(saved):
    """Compare with the same three steps in one process, so that a wrong order of experts could not pass as equal."""
    checkpoint, loaded = saved
    alone = run_ranks(1, jobs.gradients_then_losses, tiny_spec(), STEPS)[0]["weights"]
    for name, tensor in loaded["weights"].items():
        torch.testing.assert_close(tensor, alone[name], atol=1e-4, rtol=1e-3, msg=name)
    assert {"weights", "optim", "manifest.json"} == {p.name for p in checkpoint.iterdir()}


WAYS = {
    "alone": {"workers": 1, "ep": 1},
    "ddp": {"workers": 2, "ep": 2},
    "fsdp": {"workers": 2, "ep": 1, "strategy": "fsdp"},
    "fsdp-experts": {"workers": 4, "ep": 2, "strategy": "fsdp", "shard_experts": True},
    "zero1": {"workers": 2, "ep": 2, "strategy": "zero1"},
    "zero2": {"workers": 4, "ep": 2, "strategy": "zero2"},
    "zero3": {"workers": 2, "ep": 1, "strategy": "zero3"},
}
ALWAYS = {("fsdp-experts", "zero3"), ("zero1", "fsdp-experts"), ("zero3", "alone")}


@pytest.fixture(scope="module")
def uninterrupted():
    return run_ranks(1, jobs.gradients_then_losses, tiny_spec(), STEPS + 3)[0]["losses"][STEPS:]


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory):
    """Return a function that gives the checkpoint of a run trained in one of `WAYS`, training it once for each way."""
    found = {}

    def of(way):
        if way not in found:
            _, run = trained(tmp_path_factory.mktemp(way), WAYS[way])
            found[way] = newest_checkpoint(run)[0]
        return found[way]

    return of


@pytest.mark.parametrize(
    ("saver", "loader"),
    [pytest.param(a, b, marks=[] if (a, b) in ALWAYS else [pytest.mark.slow]) for a in WAYS for b in WAYS],
)
def test_a_checkpoint_of_any_strategy_goes_on_exactly_by_any_other(saved_by, uninterrupted, saver, loader):
    if "zero" in saver + loader:
        pytest.importorskip("deepspeed")
    checkpoint = saved_by(saver)
    expected = jobs.load_and_describe(tiny_spec(), checkpoint)  # one process: this one
    spec = tiny_spec(cluster=WAYS[loader])
    for found in run_ranks(WAYS[loader]["workers"], jobs.load_and_describe, spec, checkpoint, 3):
        for part in ("weights", "moments"):
            assert found[part].keys() == expected[part].keys()
            for name, tensor in expected[part].items():
                assert torch.equal(found[part][name], tensor), f"{part} of {name}"
        assert found["losses"] == pytest.approx(uninterrupted, rel=1e-4)


EIGHT = {"model": {**tiny_spec().model.model_dump(exclude={"moe"}), "moe": {"heads": 2, "experts": 8, "d_expert": 24}}}


@pytest.fixture(scope="module")
def saved_at_four(tmp_path_factory):
    """Return a checkpoint of eight experts, two on each of four workers, and what one process trains in the same
    steps."""
    _, run = trained(tmp_path_factory.mktemp("run"), {"workers": 4, "ep": 4}, train={"micro_batches": 8}, **EIGHT)
    spec = tiny_spec(train={"micro_batches": 8}, **EIGHT)
    return newest_checkpoint(run)[0], run_ranks(1, jobs.gradients_then_losses, spec, STEPS)[0]


@pytest.mark.parametrize("ep", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_experts_saved_at_four_ranks_are_those_of_any_other_number(saved_at_four, ep):
    """Compare every weight and moment with one process that never saved, so that a wrong order of experts cannot
    pass."""
    checkpoint, expected = saved_at_four
    spec = tiny_spec(cluster={"workers": ep, "ep": ep}, train={"micro_batches": 8}, **EIGHT)
    for found in run_ranks(ep, jobs.load_and_describe, spec, checkpoint):
        for part, atol in (("weights", 1e-4), ("moments", 1e-6)):
            assert found[part].keys() == expected[part].keys()
            for name, tensor in expected[part].items():
                torch.testing.assert_close(found[part][name], tensor, atol=atol, rtol=1e-3, msg=f"{part}: {name}")


def test_experts_saved_at_four_ranks_are_served_by_one_process(saved_at_four):
    checkpoint, expected = saved_at_four
    model, _ = load_model(checkpoint)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor, expected["weights"][name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_experts_of_groups_by_node_are_those_of_any_other_layout(tmp_path, strategy):
    """Positions in the mesh differ from ranks on these nodes."""
    cluster = {"workers": 4, "ep": 2, "strategy": strategy, "shard_experts": strategy == "fsdp"}
    _, run = trained(tmp_path, cluster, ["a", "b", "b", "a"])
    found = jobs.load_and_describe(tiny_spec(), newest_checkpoint(run)[0])
    [expected] = run_ranks(1, jobs.gradients_then_losses, tiny_spec(), STEPS)
    for part, atol in (("weights", 1e-4), ("moments", 1e-6)):
        for name, tensor in expected[part].items():
            torch.testing.assert_close(found[part][name], tensor, atol=atol, rtol=1e-3, msg=f"{part}: {name}")


def test_a_checkpoint_of_a_kernel_that_cannot_run_here_is_read_all_the_same(saved, tmp_path):
    """Such a checkpoint may have been trained on GPUs and is evaluated on a CPU."""
    shutil.copytree(saved[0], tmp_path / "copy")
    path = tmp_path / "copy" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["model"]["moe"]["kernel"] = "megablocks"
    path.write_text(json.dumps(manifest))
    token_BT = torch.arange(8)[None]
    found, expected = (load_model(checkpoint)[0](token_BT).logits_BTV for checkpoint in (tmp_path / "copy", saved[0]))
    assert torch.equal(found, expected)


def test_serving_loads_the_same_weights_without_moments(saved):
    checkpoint, expected = saved
    model, _ = load_model(checkpoint)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, expected["weights"][name]), name


def test_a_model_of_another_shape_is_refused_by_name(saved):
    from mhmoe_ray.checkpoint.load import load_tensors

    checkpoint, _ = saved
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(32,\) there and \(16,\) in the model"):
        load_tensors(checkpoint / "weights", {"norm.weight": torch.empty(16)})
    with pytest.raises(CheckpointError, match="extra is not in it"):
        load_tensors(checkpoint / "weights", {"extra": torch.empty(16)})
    assert read_manifest(checkpoint).step == STEPS
