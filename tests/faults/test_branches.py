"""Tests on a real Ray cluster, with kills, of runs that are trained longer and of runs that start from another run."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import committed_checkpoints, stored_manifest
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.columns import to_model_samples
from mhmoe_ray.model.loss import token_losses
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.spec import load_resolved_spec
from tests.cli.conftest import write_spec
from tests.cli.run import assert_one_line, mhmoe
from tests.data.texts import make_documents, write_documents
from tests.faults import harness
from tests.support.watch import step_of, wait_for_end, wait_until

pytestmark = pytest.mark.ray

TRAIN = {"schedule": "constant", "warmup_steps": 0, "validate_every": 20, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, local_cluster) -> Path:
    """Return a project folder with raw text of two sources."""
    folder = tmp_path_factory.mktemp("branches")
    write_documents(folder / "raw" / "a" / "one.jsonl", make_documents("a", 60))
    write_documents(folder / "more" / "b" / "one.jsonl", make_documents("b", 40))
    return folder


def train(folder: Path, name: str, steps: int) -> RunDir:
    """Train a run, and return it when it is finished."""
    path = write_spec(folder, train={**TRAIN, "steps": steps}, cluster={"workers": 2, "ep": 2})
    path.write_text(path.read_text().replace("name: tiny", f"name: {name}"))
    run = harness.submit(folder)
    wait_for_end(run)
    return run


@pytest.fixture(scope="module")
def base(folder) -> RunDir:
    """Train a run of 20 steps."""
    return train(folder, "base", 20)


@pytest.mark.slow  # tests/cli/test_runs.py has the quick test of a run that is trained longer
def test_a_run_that_is_continued_equals_one_that_never_ended(folder, base):
    assert_one_line(mhmoe(folder, "resume", base.id), 7, "it is finished", "--until")
    assert_one_line(mhmoe(folder, "resume", base.id, "--until", "20"), 7, "its spec has 20 steps already")
    result = mhmoe(folder, "resume", base.id, "--until", "40")
    assert result.code == 0, result.err
    harness.assert_equals_undisturbed_run(base, train(folder, "whole", 40))


def branch_spec(folder: Path, base: RunDir, **changes) -> None:
    """Write the spec of a branch that starts at step 20 of a run and adds a source."""
    spec = {
        "name": "branch",
        "storage": "runs",
        "start": {"from": f"{base.id}@20", "optimizer": True, "order": "continue"},
        "data": {
            "sources": {"web": {"path": "raw", "weight": 2}, "more": {"path": "more"}},
            "prepared": "prepared-more",
            "validation_fraction": 0.2,
        },
        "train": {**TRAIN, "steps": 30, "micro_batches": 4, "micro_batch_size": 3, "lr": 1e-3},
        "cluster": {"workers": 2, "ep": 2, "max_failures": 1000},
    }
    (folder / "spec.yaml").write_text(json.dumps({**spec, **changes}))


@pytest.mark.slow
def test_a_killed_branch_with_a_new_source_equals_an_undisturbed_one(folder, base):
    """The branch changes the batch, the learning rate and the mixture.

    In each domain it reads on from the sample at which the run that it starts from had arrived.
    """
    branch_spec(folder, base)
    run = harness.submit(folder)
    worker = harness.workers_of_start(run, 1)[1]
    wait_until(lambda: step_of(run) >= 7, "seven steps")
    harness.kill(worker["pid"])
    harness.workers_of_start(run, 2)
    driver = harness.driver_of(run)
    harness.kill(driver, signal.SIGKILL)
    wait_until(lambda: harness.outcome(folder, run) == "failed", "the end of its job")
    assert mhmoe(folder, "resume", run.id).code == 0
    wait_for_end(run)
    undisturbed_run = harness.submit(folder)
    wait_for_end(undisturbed_run)
    harness.assert_equals_undisturbed_run(run, undisturbed_run)
    assert_first_loss_is_that_of_the_start(run)
    assert_old_domain_continues(run, base)
    mixture = mhmoe(folder, "data", "mix", "spec.yaml", "--json").json()
    assert mixture["whole"]["domains"]["web/a"]["samples_before"] == read_start(run).samples_before["web/a"] == 160
    status = mhmoe(folder, "status", run.id)
    assert f"copied from {base.id}, step 20, 2,560 tokens, with the optimizer's state" in " ".join(status.out.split())


@pytest.mark.slow
def test_a_killed_adapter_equals_an_undisturbed_one(folder, base):
    train = {**TRAIN, "steps": 20, "micro_batches": 4, "micro_batch_size": 3, "keep_checkpoints": 1}
    branch_spec(folder, base, start={"from": base.id}, train={**train, "adapter": {"rank": 4, "dropout": 0.1}})
    run = harness.submit(folder)
    worker = harness.workers_of_start(run, 1)[1]
    wait_until(lambda: step_of(run) >= 7, "seven steps")
    harness.kill(worker["pid"])
    wait_for_end(run)
    undisturbed_run = harness.submit(folder)
    wait_for_end(undisturbed_run)
    harness.assert_equals_undisturbed_run(run, undisturbed_run)
    checked = mhmoe(folder, "resume", run.id, "--check")
    assert checked.code == 0, checked.err
    first_checkpoint, *_, newest_checkpoint = committed_checkpoints(run)
    manifest = stored_manifest(newest_checkpoint)
    assert manifest.adapter.base == first_checkpoint.name
    assert manifest.adapter.base_sha256 == stored_manifest(first_checkpoint).weights_sha256


def assert_first_loss_is_that_of_the_start(run: RunDir) -> None:
    """Assert that a branch's first loss is that of the checkpoint it starts from, on the same samples.

    Its last checkpoint must also count the updates of the run that it starts from.
    """
    spec, start = run.spec(), read_start(run)
    samples = TrainingSamples(spec, start.samples_before)
    stored = samples.read(np.arange(spec.samples_per_step))
    model_samples = to_model_samples(stored, samples.token_bytes)
    tokens, counts = torch.from_numpy(model_samples.token_ids), torch.from_numpy(model_samples.target_mask)
    model, _ = load_model(Path(start.ancestors[0].path))
    losses = token_losses(model(tokens[:, :-1]).logits_BTV, tokens[:, 1:])[counts]
    assert history.read(run)[0][metrics.LOSS] == pytest.approx(float(losses.mean()), abs=1e-4)
    checkpoint = committed_checkpoints(run)[-1]
    assert stored_manifest(checkpoint).updates == 20 + spec.train.steps


def assert_old_domain_continues(run: RunDir, base: RunDir) -> None:
    """Assert that `base` and its branch `run` together read the old domain's samples that `base` alone would read."""
    spec = run.spec()
    samples = TrainingSamples(spec, read_start(run).samples_before)
    located = [samples.locate_sample(i) for i in range(spec.train.steps * spec.samples_per_step)]
    by_branch = [sample for domain, sample in located if domain == "web/a"]
    base_spec = base.spec()
    base_spec = base_spec.model_copy(update={"train": base_spec.train.model_copy(update={"steps": 1000})})
    unbranched_samples = TrainingSamples(base_spec)
    expected = [unbranched_samples.locate_sample(i)[1] for i in range(160 + len(by_branch))]
    assert by_branch == expected[160:]
    assert {domain for domain, _ in located} == {"web/a", "more/b"}


@pytest.mark.slow  # uses the data that the slow test of the killed branch prepares
def test_a_branch_that_cannot_be_continued_is_refused_before_it_is_submitted(folder, base):
    branch_spec(folder, base, seed=1)
    assert_one_line(mhmoe(folder, "submit", "spec.yaml", "--detach"), 3, f"seed is 1, and that of {base.id}")
    branch_spec(folder, base)
    limit = ("--set", "data.sources.web.max_epochs=0.1")
    assert_one_line(mhmoe(folder, "submit", "spec.yaml", *limit), 4, "has read 160 samples, and max_epochs allows")
    assert load_resolved_spec(base.spec_file).seed == 0
