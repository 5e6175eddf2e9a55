"""Tests of checkpoints across world sizes: every weight and moment is compared by global expert id."""

import json
import shutil

import pytest
import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import MANIFEST, newest_checkpoint, read_manifest
from mhmoe_ray.errors import CheckpointError
from tests.support.ranks import run_ranks
from tests.support.runs import new_run
from tests.support.specs import tiny_spec
from tests.train import jobs

STEPS = 3


def train_and_save(folder, cluster, nodes=None, **sections):
    """Create a run, train it for `STEPS` steps, save a checkpoint, and return the spec and the run.

    `nodes` has the node of each rank, by default one node for all.
    """
    spec, run = new_run(folder, cluster, **sections)
    run_ranks(cluster["workers"], jobs.train_and_save, spec, run.path, STEPS, nodes)
    return spec, run


@pytest.fixture(scope="module")
def saved_checkpoint(tmp_path_factory):
    """Return a checkpoint of two workers with ep 2, and what `load_and_describe` returns for it on two such workers."""
    spec, run = train_and_save(tmp_path_factory.mktemp("run"), {"workers": 2, "ep": 2})
    checkpoint, manifest, skipped = newest_checkpoint(run)
    assert skipped == []
    assert (manifest.step, manifest.position, manifest.tokens) == (STEPS, STEPS * 8, STEPS * 8 * 16)
    return checkpoint, run_ranks(2, jobs.load_and_describe, spec, checkpoint)[0]


@pytest.mark.parametrize(("workers", "ep"), [(1, 1), (2, 1), (4, 4)])
def test_checkpoint_of_two_ranks_loads_at_any_world_size(saved_checkpoint, workers, ep):
    checkpoint, expected = saved_checkpoint
    spec = tiny_spec(cluster={"workers": workers, "ep": ep})
    for result in run_ranks(workers, jobs.load_and_describe, spec, checkpoint):
        assert (result["step"], result["tokens"]) == (STEPS, STEPS * 8 * 16)
        for part in ("weights", "moments"):
            assert result[part].keys() == expected[part].keys()
            for name, tensor in expected[part].items():
                assert torch.equal(result[part][name], tensor), f"{part} of {name}"


def test_saved_state_matches_training(saved_checkpoint):
    """Loaded weights equal those after the same steps in one process, so that a wrong order of experts would show."""
    checkpoint, loaded_state = saved_checkpoint
    expected_weights = run_ranks(1, jobs.train_and_collect, tiny_spec(), STEPS)[0]["weights"]
    for name, tensor in loaded_state["weights"].items():
        torch.testing.assert_close(tensor, expected_weights[name], atol=1e-4, rtol=1e-3, msg=name)
    assert {"weights", "optim", "manifest.json"} == {p.name for p in checkpoint.iterdir()}


CLUSTERS = {
    "alone": {"workers": 1, "ep": 1},
    "ddp": {"workers": 2, "ep": 2},
    "fsdp": {"workers": 2, "ep": 1, "strategy": "fsdp"},
    "fsdp-experts": {"workers": 4, "ep": 2, "strategy": "fsdp", "shard_experts": True},
    "hybrid": {"workers": 4, "ep": 1, "strategy": "fsdp", "shard_experts": True, "shard_group": 2},
    "zero1": {"workers": 2, "ep": 2, "strategy": "zero1"},
    "zero2": {"workers": 4, "ep": 2, "strategy": "zero2"},
    "zero3": {"workers": 2, "ep": 1, "strategy": "zero3"},
}
ALWAYS = {("fsdp-experts", "zero3"), ("zero1", "hybrid"), ("hybrid", "fsdp-experts"), ("zero3", "alone")}


@pytest.fixture(scope="module")
def uninterrupted_losses():
    """Return the losses of the three steps after `STEPS`, of a run in one process that never stopped."""
    return run_ranks(1, jobs.train_and_collect, tiny_spec(), STEPS + 3)[0]["losses"][STEPS:]


@pytest.fixture(scope="module")
def checkpoint_by(tmp_path_factory):
    """Return a function that trains a run on one of `CLUSTERS` once, and returns its checkpoint."""
    checkpoints = {}

    def checkpoint_of(cluster_name):
        if cluster_name not in checkpoints:
            _, run = train_and_save(tmp_path_factory.mktemp(cluster_name), CLUSTERS[cluster_name])
            checkpoints[cluster_name] = newest_checkpoint(run)[0]
        return checkpoints[cluster_name]

    return checkpoint_of


@pytest.mark.parametrize(
    ("saver", "loader"),
    [pytest.param(a, b, marks=[] if (a, b) in ALWAYS else [pytest.mark.slow]) for a in CLUSTERS for b in CLUSTERS],
)
def test_checkpoint_of_any_strategy_continues_with_any_other(checkpoint_by, uninterrupted_losses, saver, loader):
    if "zero" in saver + loader:
        pytest.importorskip("deepspeed")
    checkpoint = checkpoint_by(saver)
    expected = jobs.load_and_describe(tiny_spec(), checkpoint)  # this process loads it as the only rank
    spec = tiny_spec(cluster=CLUSTERS[loader])
    for result in run_ranks(CLUSTERS[loader]["workers"], jobs.load_and_describe, spec, checkpoint, 3):
        for part in ("weights", "moments"):
            assert result[part].keys() == expected[part].keys()
            for name, tensor in expected[part].items():
                assert torch.equal(result[part][name], tensor), f"{part} of {name}"
        assert result["losses"] == pytest.approx(uninterrupted_losses, rel=1e-4)


@pytest.mark.parametrize("saver", ["alone", pytest.param("ddp", marks=pytest.mark.slow), "fsdp-experts"])
def test_moments_in_bfloat16_load_at_any_world_size_and_continue(tmp_path, saver):
    """A restart on the same ranks changes no bit, and other ranks load the same moments and round alike.

    The random bits of stochastic rounding depend only on the update and on positions in full tensors.
    """
    train = {"moment_precision": "bfloat16"}
    _, run = train_and_save(tmp_path, CLUSTERS[saver], train=train)
    checkpoint = newest_checkpoint(run)[0]
    single_spec = tiny_spec(train=train)
    expected = run_ranks(1, jobs.load_and_describe, single_spec, checkpoint, 3)[0]
    assert all(t.dtype == torch.bfloat16 for name, t in expected["moments"].items() if "exp_avg" in name)
    uninterrupted_losses = run_ranks(1, jobs.train_and_collect, single_spec, STEPS + 3)[0]["losses"][STEPS:]
    if saver == "alone":
        assert expected["losses"] == uninterrupted_losses
    for loader in ("ddp", "fsdp-experts"):
        spec = tiny_spec(cluster=CLUSTERS[loader], train=train)
        for result in run_ranks(CLUSTERS[loader]["workers"], jobs.load_and_describe, spec, checkpoint, 3):
            assert all(torch.equal(result["moments"][name], t) for name, t in expected["moments"].items())
            assert result["losses"] == pytest.approx(uninterrupted_losses, rel=1e-3)


def test_moments_change_their_precision_in_a_branch(saved_checkpoint):
    """A run in bfloat16 that starts from moments in float32 rounds them to nearest."""
    checkpoint, expected = saved_checkpoint
    spec = tiny_spec(train={"moment_precision": "bfloat16"})
    [result] = run_ranks(1, jobs.load_and_describe, spec, checkpoint)
    for name, tensor in expected["moments"].items():
        assert torch.equal(result["moments"][name], tensor.bfloat16())


EIGHT_EXPERTS = {
    "model": {**tiny_spec().model.model_dump(exclude={"moe"}), "moe": {"heads": 2, "experts": 8, "d_expert": 24}}
}


@pytest.fixture(scope="module")
def four_rank_checkpoint(tmp_path_factory):
    """Return a checkpoint of a model with eight experts, trained on four workers with ep 4, and the results of the same
    steps in one process."""
    _, run = train_and_save(
        tmp_path_factory.mktemp("run"), {"workers": 4, "ep": 4}, train={"micro_batches": 8}, **EIGHT_EXPERTS
    )
    spec = tiny_spec(train={"micro_batches": 8}, **EIGHT_EXPERTS)
    return newest_checkpoint(run)[0], run_ranks(1, jobs.train_and_collect, spec, STEPS)[0]


@pytest.mark.parametrize("ep", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_experts_of_four_ranks_load_at_any_world_size(four_rank_checkpoint, ep):
    """Loaded weights and moments are compared with those of one process that never saved, so that a wrong order of
    experts would show."""
    checkpoint, expected = four_rank_checkpoint
    spec = tiny_spec(cluster={"workers": ep, "ep": ep}, train={"micro_batches": 8}, **EIGHT_EXPERTS)
    for result in run_ranks(ep, jobs.load_and_describe, spec, checkpoint):
        for part, atol in (("weights", 1e-4), ("moments", 1e-6)):
            assert result[part].keys() == expected[part].keys()
            for name, tensor in expected[part].items():
                torch.testing.assert_close(result[part][name], tensor, atol=atol, rtol=1e-3, msg=f"{part}: {name}")


def test_experts_of_four_ranks_load_for_serving(four_rank_checkpoint):
    checkpoint, expected = four_rank_checkpoint
    model, _ = load_model(checkpoint)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor, expected["weights"][name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_experts_of_groups_by_node_load_in_one_process(tmp_path, strategy):
    """The mesh for these nodes does not have the ranks in the order of their numbers."""
    cluster = {"workers": 4, "ep": 2, "strategy": strategy, "shard_experts": strategy == "fsdp"}
    _, run = train_and_save(tmp_path, cluster, ["a", "b", "b", "a"])
    result = jobs.load_and_describe(tiny_spec(), newest_checkpoint(run)[0])
    [expected] = run_ranks(1, jobs.train_and_collect, tiny_spec(), STEPS)
    for part, atol in (("weights", 1e-4), ("moments", 1e-6)):
        for name, tensor in expected[part].items():
            torch.testing.assert_close(result[part][name], tensor, atol=atol, rtol=1e-3, msg=f"{part}: {name}")


def test_checkpoint_of_unavailable_kernel_loads(saved_checkpoint, tmp_path):
    """A model that was trained on GPUs may be evaluated on a CPU."""
    shutil.copytree(saved_checkpoint[0], tmp_path / "copy")
    path = tmp_path / "copy" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["model"]["moe"]["kernel"] = "megablocks"
    path.write_text(json.dumps(manifest))
    token_BT = torch.arange(8)[None]
    actual, expected = (
        load_model(checkpoint)[0](token_BT).logits_BTV for checkpoint in (tmp_path / "copy", saved_checkpoint[0])
    )
    assert torch.equal(actual, expected)


def test_load_model_loads_the_saved_weights(saved_checkpoint):
    checkpoint, expected = saved_checkpoint
    model, _ = load_model(checkpoint)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, expected["weights"][name]), name


def test_tensor_of_another_shape_is_rejected(saved_checkpoint):
    from mhmoe_ray.checkpoint.load import load_tensors

    checkpoint, _ = saved_checkpoint
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(32,\) there and \(16,\) in the model"):
        load_tensors(checkpoint / "weights", {"norm.weight": torch.empty(16)})
    with pytest.raises(CheckpointError, match="extra is not in it"):
        load_tensors(checkpoint / "weights", {"extra": torch.empty(16)})
    assert read_manifest(checkpoint).step == STEPS
