"""Tests of runs on pairs: the stored reference, kills, and other numbers of workers."""

import json
import math

import numpy as np
import pytest

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train.objectives.dpo import _decode
from tests.cli.conftest import write_spec
from tests.cli.run import mhmoe
from tests.faults import harness
from tests.support.watch import events_of_kind, newest_run, start_events, wait_for_end, wait_until
from tests.train.image_runs import assert_a_kill_changes_nothing, assert_refused, train_to_end

pytestmark = [pytest.mark.ray, pytest.mark.long]

COLOURS, THINGS = ["red", "blue", "green", "white", "black"], ["sea", "sky", "grass", "moon", "night", "boat"]


def write_pairs_spec(folder, base, workers=2):
    data = {
        "sources": {"pairs": {"path": "pairs", "format": "preferences"}},
        "prepared": "prepared-pairs",
        "tokenizer": "prepared/tokenizer.json",
        "packing": "best_fit",
        "seq_len": 96,
    }
    train = {"steps": 12, "validate_every": 6, "checkpoint_every": 3, "warmup_steps": 0}
    cluster = {"workers": workers, "ep": workers, "max_failures": 5}
    write_spec(folder, start={"from": base.id}, model={"document_masks": True}, data=data, train=train, cluster=cluster)


def references(run):
    return _decode(run.reference_file.read_bytes())


@pytest.fixture(scope="module")
def project(tmp_path_factory, local_cluster):
    """Return a project folder with pairs and conversations."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs, conversations = [], []
    for thing in THINGS:
        for colour in COLOURS:
            question, yes, no = f"Is the {thing} {colour}?", f"Yes, it is {colour}.", f"No, the {thing} is not."
            pairs.append({"prompt": question, "chosen": no, "rejected": yes})
            conversations += [{"prompt": question, "completion": answer} for answer in (yes, no)]
    for name, records in (("pairs", pairs), ("raw", conversations)):
        (folder / name).mkdir()
        (folder / name / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def base(project) -> RunDir:
    """Return the run from which runs on pairs start."""
    data = {"sources": {"web": {"path": "raw", "format": "chat"}}, "packing": "best_fit", "seq_len": 96}
    train = {"steps": 20, "validate_every": 20, "checkpoint_every": 20}
    write_spec(project, model={"document_masks": True}, data=data, train=train)
    return train_to_end(project)


@pytest.fixture(scope="module")
def run(project, base) -> RunDir:
    """Return a finished run on pairs, of two workers."""
    write_pairs_spec(project, base)
    return train_to_end(project)


def test_a_run_on_pairs_prefers_the_chosen_answers(project, run):
    """Check that the first loss is log 2, because the model is its reference then, if this is in the right order."""
    first_line, *_, last_line = history.read(run)
    assert first_line[metrics.LOSS] == pytest.approx(math.log(2), abs=1e-6)
    assert all(abs(value) < 1e-6 for value in first_line[metrics.REWARDS].values())
    assert last_line[metrics.LOSS] < 0.6
    for key in (metrics.REWARDS, metrics.VAL_REWARDS):
        assert last_line[key]["margins"] == pytest.approx(last_line[key]["chosen"] - last_line[key]["rejected"])
        assert last_line[key]["accuracies"] > 0.9
    [event] = events_of_kind(run, "referenced")
    assert event["pairs"] + event["held_out"] == len(references(run)) == len(THINGS) * len(COLOURS)
    status = " ".join(mhmoe(project, "status", run.id).out.split())
    assert "nats per pair" in status
    assert "rewards chosen" in status
    assert "perplexity" not in status


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(project, base, run):
    write_pairs_spec(project, base)
    killed, undisturbed = assert_a_kill_changes_nothing(project, run)
    assert killed.objective == undisturbed.objective
    assert len(events_of_kind(newest_run(project), "referenced")) == 1


@pytest.mark.slow
def test_a_kill_before_the_first_step_leaves_no_half_of_a_reference(project, base, run):
    write_pairs_spec(project, base)
    killed_run = harness.submit(project)
    [start] = wait_until(lambda: start_events(killed_run), "the start of the workers")
    for worker in start["workers"]:
        harness.kill(worker["pid"])
    wait_for_end(killed_run)
    assert killed_run.reference_file.read_bytes() == run.reference_file.read_bytes()
    assert [path.name for path in killed_run.path.glob("*reference*")] == ["reference.arrow"]
    losses, expected_losses = ([line[metrics.LOSS] for line in history.read(r)] for r in (killed_run, run))
    assert losses == expected_losses


@pytest.mark.slow
def test_another_number_of_workers_trains_alike_and_reads_the_stored_reference(project, base, run):
    write_pairs_spec(project, base, workers=1)
    single_run = train_to_end(project)
    np.testing.assert_allclose(references(single_run), references(run), rtol=1e-5)
    losses, expected_losses = ([line[metrics.LOSS] for line in history.read(r)] for r in (single_run, run))
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    content = single_run.reference_file.read_bytes()
    result = mhmoe(project, "resume", single_run.id, "--until", "15", "--set", "cluster.workers=2")
    assert result.code == 0, result.err
    assert single_run.reference_file.read_bytes() == content
    assert len(events_of_kind(single_run, "referenced")) == 1
    assert [line[metrics.GROUP] for line in history.read(single_run)] == [1] * 12 + [2] * 3
    single_run.reference_file.write_bytes(content[:-1])
    assert_refused(project, ["resume", single_run.id, "--until", "18"], "with which the run began; restore it, or")
