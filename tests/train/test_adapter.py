"""Tests of training with an adapter on several ranks, without Ray: gradients, checkpoints, and what they hold."""

import pytest
import torch
import torch.nn.functional as F

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import committed_checkpoints, newest_checkpoint
from mhmoe_ray.model.adapter import is_adapter
from mhmoe_ray.spec import RunSpec
from tests.support.ranks import run_ranks
from tests.support.specs import tiny_spec
from tests.support.starts import TRAIN, make_source, start_run
from tests.train import jobs
from tests.train.alike import assert_alike

pytestmark = pytest.mark.long

MODEL = {**tiny_spec().model.model_dump(), "vocab_size": 320}
MODEL["moe"] |= {"d_shared": 16}
ADAPTER = {
    "rank": 4,
    "targets": ["query", "value", "out", "projections", "feed_forward", "shared", "router", "experts"],
}
DROPOUT = 0.2


def adapter_spec(spec: RunSpec, dropout=0.0, precision="float32", base_precision="float32", **cluster) -> RunSpec:
    """Return the spec with other keys of the adapter and the cluster."""
    adapter = {**spec.train.adapter.model_dump(), "base_precision": base_precision, "dropout": dropout}
    train = {**spec.train.model_dump(), "precision": precision, "adapter": adapter}
    return RunSpec.model_validate({**spec.model_dump(by_alias=True), "train": train, "cluster": cluster})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run with an adapter whose checkpoint of step 0 has the weights of another run."""
    folder = tmp_path_factory.mktemp("adapter")
    source = make_source(folder, model=MODEL)
    return start_run(folder, source.id, {}, train={**tiny_spec(train=TRAIN).train.model_dump(), "adapter": ADAPTER})


@pytest.fixture(scope="module")
def reference(run):
    return run_ranks(1, jobs.train_and_collect, adapter_spec(run.spec(), DROPOUT), 6)[0]


@pytest.mark.parametrize(
    ("workers", "ep", "strategy", "shard_experts"),
    [(2, 2, "ddp", False), (4, 4, "fsdp", False), (4, 2, "fsdp", True), (2, 1, "fsdp", True), (2, 1, "ddp", False)],
)
def test_every_mesh_trains_an_adapter_like_one_process(run, reference, workers, ep, strategy, shard_experts):
    spec = adapter_spec(run.spec(), DROPOUT, workers=workers, ep=ep, strategy=strategy, shard_experts=shard_experts)
    for result in run_ranks(workers, jobs.train_and_collect, spec, 6):
        assert_alike(result, reference)
    assert all(map(is_adapter, reference["weights"]))
    assert len(reference["moments"]) == 2 * len(reference["weights"])


def test_a_base_in_bfloat16_trains_like_its_copies_in_products(run):
    """Products round float32 weights to bfloat16 too, so one process has equal bits."""
    base, losses = committed_checkpoints(run)[0], {}
    for precision, workers, cluster in (
        ("float32", 1, {}),
        ("bfloat16", 1, {}),
        ("bfloat16", 2, {"workers": 2, "ep": 2}),
        ("bfloat16", 4, {"workers": 4, "ep": 2, "strategy": "fsdp", "gather_precision": "bfloat16"}),
    ):
        spec = adapter_spec(run.spec(), 0.0, "bfloat16", precision, **cluster)
        losses[precision, workers] = run_ranks(workers, jobs.load_and_describe, spec, base, 6)[0]["losses"]
    expected = losses.pop(("float32", 1))
    assert losses["bfloat16", 1] == expected
    assert all(values == pytest.approx(expected, rel=2e-3) for values in losses.values())


def test_adapters_continue_on_other_meshes_and_load_as_one_model(run):
    """Training goes on from the base and the adapter of a checkpoint; readers see their sums as the weights."""
    base = committed_checkpoints(run)[0]
    spec = adapter_spec(run.spec(), workers=2, ep=2)
    run_ranks(2, jobs.continue_and_save, spec, run.path, base, 4)
    newest = newest_checkpoint(run)
    assert newest.manifest.step == 4
    assert newest.manifest.adapter.base == base.name
    continued = run_ranks(1, jobs.load_and_describe, run.spec(), newest.checkpoint, 3)[0]
    other_spec = adapter_spec(run.spec(), workers=4, ep=2, strategy="fsdp", shard_experts=True)
    continued_by_four = run_ranks(4, jobs.load_and_describe, other_spec, newest.checkpoint, 3)[0]
    assert continued["losses"] == pytest.approx(continued_by_four["losses"], rel=1e-5)
    for name, weight in continued["weights"].items():
        torch.testing.assert_close(continued_by_four["weights"][name], weight, rtol=0, atol=0)
    model, _ = load_model(newest.checkpoint)
    batches = jobs.micro_batches(run.spec(), 4)
    losses = [F.cross_entropy(model(b.token_BT[:, :-1]).logits_BTV.mT, b.token_BT[:, 1:]).item() for b in batches]
    assert sum(losses) / len(losses) == pytest.approx(continued["losses"][0], rel=1e-5)
