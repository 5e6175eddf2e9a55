"""Tests of runs that train a vision model: samples on any number of workers and after a kill, evaluation, routing."""

import copy
import json

import pytest

from mhmoe_ray.runs import history, metrics
from tests.cli.run import mhmoe
from tests.data.scenes import write_class_folders, write_coco_folder
from tests.support.vision_specs import STEPS, write_spec
from tests.support.visions import VISION
from tests.support.watch import events_of_kind
from tests.train.image_runs import assert_a_kill_changes_nothing, assert_refused, streams, train_to_end

pytestmark = pytest.mark.long
PREPARE = ["data", "prepare", "spec.yaml"]
TEXT_WITHOUT_CLASSES = ["--text", "raw/test-classes", "--set", "data.sources.test-classes.format=images"]


@pytest.fixture(scope="module")
def project(tmp_path_factory, local_cluster):
    """Return a project folder with images, whose first run prepares the data for all others."""
    folder = tmp_path_factory.mktemp("vision")
    write_class_folders(folder / "raw" / "classes", 60)
    write_coco_folder(folder / "raw" / "scenes", 50)
    write_class_folders(folder / "raw" / "test-classes", 12)
    write_coco_folder(folder / "raw" / "test-scenes", 10)
    return folder


def train(folder, workers):
    """Train a run on some number of workers to its end, and return it."""
    write_spec(folder, workers)
    return train_to_end(folder)


@pytest.fixture(scope="module")
def run(project):
    """Return a finished run of two workers."""
    return train(project, 2)


@pytest.mark.slow
def test_samples_and_losses_are_the_same_on_any_number_of_workers(project, run):
    other_run = train(project, 1)
    assert streams(other_run) == streams(run)
    for line, expected in zip(history.read(other_run), history.read(run), strict=True):
        assert line[metrics.PART_LOSS] == pytest.approx(expected[metrics.PART_LOSS], rel=5e-3, abs=1e-4)


def test_tasks_change_their_numbers_of_experts(run):
    assert len(set(streams(run))) == STEPS
    # A step is trained with the numbers that the validation before it has led to.
    assert [line[metrics.TASK_TOP_K]["detect"] for line in history.read(run)] == [2, 2, 3, 3, 2, 2, 2, 2]
    adapted = [(e["step"], e["task"], e["top_k"]) for e in events_of_kind(run, "adapted")]
    assert adapted == [(2, "classify", 3), (2, "detect", 3), (4, "classify", 2), (4, "detect", 2)]


def test_a_killed_run_ends_as_an_undisturbed_one(project, run):
    write_spec(project, 2)
    killed, undisturbed = assert_a_kill_changes_nothing(project, run)
    assert killed.objective == undisturbed.objective is not None


def test_a_vision_model_is_evaluated_on_held_out_images_and_on_others(project, run):
    held_out = mhmoe(project, "eval", run.id, "--json").json()["vision"]
    validation = history.read(run)[-1][metrics.VAL_PART_LOSS]
    assert held_out["losses"].keys() == validation.keys()
    assert held_out["losses"]["classify"] == pytest.approx(validation["classify"], rel=1e-4)
    [accuracy] = held_out["classes"].values()
    assert 0 <= accuracy["top_1"] <= accuracy["top_5"] == 1
    # The classes are colours, so the training image that is nearest in pixels nearly always has the right class.
    assert accuracy["baseline"] > 0.9
    text = ["--text", "raw/test-classes", "--text", "raw/test-scenes/annotations/*.json"]
    keys = {"test-classes": ("images", "[image,class]"), "annotations": ("coco", "[image,objects]")}
    for name, (format_name, columns) in keys.items():
        text += [
            "--set",
            f"data.sources.{name}.format={format_name}",
            "--set",
            f"data.sources.{name}.columns={columns}",
        ]
    result = mhmoe(project, "eval", run.id, *text)
    assert result.code == 0, result.err
    assert "any class AP50" in result.out
    other_figures = mhmoe(project, "eval", run.id, *text, "--json").json()["vision"]
    assert (other_figures["classes"]["classify"]["images"], other_figures["objects"]["detect"]["objects"]) == (12, 10)
    # The evaluation has counted the routes, too, of each task.
    routing = mhmoe(project, "routing", run.id, "--json").json()
    assert routing["domains"].keys() == {"classify images", "detect images"}
    assert routing["domains"]["detect images"]["tokens"] % 64 == 0


def test_plan_status_and_data_describe_a_vision_model(project, run):
    write_spec(project, 2)
    plan = mhmoe(project, "plan", "spec.yaml").out
    assert "objects of 3 classes" in plan
    assert "a router for each task, which chooses up to 3 experts" in plan
    status = mhmoe(project, "status", run.id)
    assert status.code == 0, status.err
    assert "detect_masks" in status.out
    assert "perplexity" not in status.out
    prepared = mhmoe(project, "data", "prepare", "spec.yaml")
    assert "held-out images" in prepared.out, prepared.err


@pytest.mark.slow  # tests/data/prepare/test_classes.py has a quick test of the same error
def test_more_classes_than_outputs_end_a_preparation(project):
    tasks = copy.deepcopy(VISION["model"]["vision"]["tasks"])
    tasks["classify"]["classes"] = 2
    write_spec(project, 1, model={"vision": {**VISION["model"]["vision"], "tasks": tasks}}, data={"prepared": "few"})
    assert_refused(project, PREPARE, "raise model.vision.tasks.classify.classes to 3")


def test_a_broken_object_ends_a_preparation_with_its_id(project):
    write_coco_folder(project / "raw" / "broken", 10)
    path = project / "raw" / "broken" / "annotations" / "instances_train.json"
    path.write_text(path.read_text().replace('"bbox": [', '"bbox": ["wide", ', 1))
    sources = copy.deepcopy(VISION["data"]["sources"])
    sources["drawings"]["path"], sources["scenes"]["path"] = "raw/classes", str(path)
    write_spec(project, 1, data={"prepared": "broken", "sources": sources})
    assert_refused(project, PREPARE, "annotation 1: ")


@pytest.mark.slow  # tests/data/prepare/test_classes.py has a quick test of the same error
def test_objects_without_masks_end_a_preparation_for_a_detector_that_learns_masks(project):
    write_coco_folder(project / "raw" / "boxes", 10)
    path = project / "raw" / "boxes" / "annotations" / "instances_train.json"
    tree = json.loads(path.read_text())
    del tree["annotations"][3]["segmentation"]
    path.write_text(json.dumps(tree))
    sources = copy.deepcopy(VISION["data"]["sources"])
    sources["drawings"]["path"], sources["scenes"]["path"] = "raw/classes", str(path)
    write_spec(project, 1, data={"prepared": "boxes", "sources": sources})
    assert_refused(project, PREPARE, "task detect: 1 of its objects have no mask; add masks, or set")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param(["generate", "{run}", "--prompt", "a"], "its model is a vision model", id="generate"),
        pytest.param(["ckpt", "export", "{run}", "--to", "exported"], "a vision model", id="export"),
        pytest.param(
            ["eval", "{run}", "--tasks", "english"],
            "lm-eval's tasks are for decoders",
            id="tasks",
            marks=pytest.mark.slow,
        ),
        pytest.param(["eval", "{run}", *TEXT_WITHOUT_CLASSES], "no task", id="text", marks=pytest.mark.slow),
    ],
)
def test_what_only_other_models_do_is_refused_in_one_line(project, run, arguments, error):
    assert_refused(project, [word.format(run=run.id) for word in arguments], error)
