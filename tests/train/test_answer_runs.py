"""Tests of runs on files in the formats of VQAv2 and NLVR2: preparation, training, a kill, and evaluation."""

import copy
import json

import pytest
import yaml

from mhmoe_ray.corpus.questions import write_question_sample
from mhmoe_ray.runs import history, metrics
from tests.cli.run import mhmoe
from tests.support.encoders import ENCODER
from tests.train.image_runs import assert_a_kill_changes_nothing, assert_refused, streams, train_to_end

pytestmark = pytest.mark.long
STEPS = 8


def write_spec(folder, workers=2):
    tree = copy.deepcopy(ENCODER)
    tree["storage"] = "runs"
    tree["model"]["encoder"] = {
        "image_size": 48,
        "patch_size": 16,
        "text_positions": 12,
        "answers": 12,
        "compares": True,
    }
    tree["data"] = {
        "sources": {
            "questions": {"path": "raw/vqa/train", "format": "vqa"},
            "sentences": {"path": "raw/nlvr2/train", "format": "nlvr2"},
        },
        "parts": {
            "answer": {"sources": ["questions"], "micro_batch_size": 4, "objective": "answer"},
            "judge": {"sources": ["sentences"], "micro_batch_size": 2, "objective": "compare"},
        },
        "prepared": "prepared",
        "seq_len": 12,
        "validation_fraction": 0.2,
    }
    changes = {"steps": STEPS, "micro_batch_size": 6, "validate_every": 4, "checkpoint_every": 2}
    tree["train"] |= changes
    tree["cluster"] = {"workers": workers, "ep": workers}
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


@pytest.fixture(scope="module")
def project(tmp_path_factory, local_cluster):
    folder = tmp_path_factory.mktemp("questions")
    write_question_sample(folder / "raw", counts={"train": (60, 20), "test": (10, 5)})
    return folder


@pytest.fixture(scope="module")
def run(project):
    write_spec(project)
    return train_to_end(project)


@pytest.mark.slow
def test_samples_and_losses_are_the_same_on_one_worker(project, run):
    write_spec(project, workers=1)
    other_run = train_to_end(project)
    assert streams(other_run) == streams(run)
    for line, expected in zip(history.read(other_run), history.read(run), strict=True):
        assert line[metrics.PART_LOSS] == pytest.approx(expected[metrics.PART_LOSS], rel=2e-3)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(project, run):
    write_spec(project)
    assert_a_kill_changes_nothing(project, run)


def test_held_out_and_other_questions_are_evaluated(project, run):
    classes = json.loads(run.classes_file.read_text())
    assert len(set(classes["answer"])) == 12
    evaluation = mhmoe(project, "eval", run.id, "--json").json()["encoder"]
    losses = {name: score["loss"] for name, score in evaluation["losses"].items()}
    assert losses == pytest.approx(history.read(run)[-1][metrics.VAL_PART_LOSS], rel=1e-4)
    assert evaluation["answers"].keys() == {"questions/all", "sentences/all"}
    for name, format, samples in (("vqa", "vqa", 20), ("nlvr2", "nlvr2", 20)):
        options = ["--text", f"raw/{name}/test", "--set", f"data.sources.test.format={format}"]
        [figures] = mhmoe(project, "eval", run.id, *options, "--json").json()["encoder"]["answers"].values()
        assert figures.keys() == {"model", "blank", "language", "nearest_image"}
        for score in figures.values():
            assert score["samples"] >= samples
            assert 0 <= score["accuracy"] <= 1
            assert (score["consistency"] is None) == (format == "vqa")
        if format == "nlvr2":
            # Every sentence is true of half of its pairs.
            assert figures["language"]["accuracy"] == 0.5


def test_a_missing_image_is_named(project):
    write_question_sample(project / "gaps", counts={"train": (60, 20)})
    (project / "gaps" / "nlvr2" / "train" / "train" / "train-3-1-img1.png").unlink()
    spec = (project / "spec.yaml").read_text().replace("raw/", "gaps/").replace("prepared: prepared", "prepared: gone")
    (project / "gaps.yaml").write_text(spec)
    assert_refused(project, ["data", "prepare", "gaps.yaml"], "train-3-1-0: train-3-1-img1.png: no such file in")
