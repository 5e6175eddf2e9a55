"""Tests of the evaluation of vision models on raw images: which task a source is for, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mhmoe_ray.checkpoint.manifest import committed_checkpoints, read_manifest
from mhmoe_ray.data.images.annotations import Annotation
from mhmoe_ray.errors import DataError
from mhmoe_ray.evaluate.answer import EvaluationContext
from mhmoe_ray.evaluate.request import EvalRequest
from mhmoe_ray.families.vision.evaluate.figures import _accuracy_figures, vision_figures
from mhmoe_ray.spec import DataSpec
from tests.support.served_vision import make_vision_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run with two tasks of classification, two of detection, and no prepared data."""
    run, _ = make_vision_run(tmp_path_factory.mktemp("vision"))
    return run


def evaluate(run, sources):
    """Evaluate the only checkpoint of a run on raw images of `sources`, and return the scores of its tasks."""
    request = EvalRequest(
        run=str(run.path),
        checkpoint="",
        prepared=None,
        text=DataSpec(sources=sources, prepared="/nowhere"),
        samples=100,
        tasks=[],
        task_folders=[],
        limit=None,
        batch=1,
        half=False,
        cpus=1,
        gpus=0,
    )
    [checkpoint] = committed_checkpoints(run)
    context = EvaluationContext(request, run, checkpoint, read_manifest(checkpoint), print, lambda *_: None)
    return vision_figures(context)["vision"]


def write_classes(folder, names):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name / "image.png")
    return {"path": str(folder), "format": "images", "columns": ["image", "class"]}


def write_objects(folder, class_name, *, has_masks):
    folder.mkdir()
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(folder / "image.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 10, 10], "area": 100, "iscrowd": 0}
    if has_masks:
        annotation["segmentation"] = [[2, 2, 12, 2, 12, 12, 2, 12]]
    tree = {
        "images": [{"id": 1, "file_name": "image.png", "width": 30, "height": 20}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": class_name}],
    }
    (folder / "instances.json").write_text(json.dumps(tree))
    return {"path": str(folder / "instances.json"), "format": "coco", "columns": ["image", "objects"]}


def test_a_source_is_for_the_task_that_knows_its_classes_and_several_sources_are_joined(run, tmp_path):
    sources = {
        "some": write_classes(tmp_path / "some", ["cat", "dog"]),
        "more": write_classes(tmp_path / "more", ["fox"]),
        "days": write_classes(tmp_path / "days", ["sun"]),
        "crossed": write_objects(tmp_path / "crossed", "cross", has_masks=False),
    }
    figures = evaluate(run, sources)
    assert {task: accuracy.images for task, accuracy in figures.classes.items()} == {"animals": 3, "weather": 1}
    assert {task: objects.objects for task, objects in figures.objects.items()} == {"marks": 1}


def test_a_source_of_unknown_classes_is_refused_unless_it_has_the_name_of_a_task(run, tmp_path):
    source = write_classes(tmp_path / "plants", ["rose"])
    with pytest.raises(DataError, match="fit 0 of the tasks animals, weather"):
        evaluate(run, {"plants": source})
    with pytest.raises(DataError, match="not trained on 1 of its classes, such as 'rose'"):
        evaluate(run, {"animals": source})


def test_objects_without_masks_are_refused_for_a_detector_that_learns_masks(run, tmp_path):
    with pytest.raises(DataError, match="images of task things: 1 of their objects have no mask"):
        evaluate(run, {"boxes": write_objects(tmp_path / "boxes", "cup", has_masks=False)})
    shutil.rmtree(tmp_path / "boxes")
    assert evaluate(run, {"boxes": write_objects(tmp_path / "boxes", "cup", has_masks=True)}).objects["things"].images


def test_a_source_without_classes_and_one_without_usable_images_are_refused(run, tmp_path):
    source = write_classes(tmp_path / "some", ["cat"])
    with pytest.raises(DataError, match="no task of the model is about what its columns have"):
        evaluate(run, {"some": {**source, "columns": ["image"]}})
    (tmp_path / "some" / "cat" / "image.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="no image in it can be used"):
        evaluate(run, {"some": source})


@pytest.mark.parametrize("worst_logit", [1.0, np.nan])
def test_ties_and_logits_that_are_no_numbers_count_against_the_model(worst_logit):
    logits_NC = np.array([[worst_logit, 1.0, 0.0], [2.0, 1.0, 0.0]], np.float32)
    figures = _accuracy_figures(logits_NC, [Annotation("cat")] * 2, ["cat", "cow", "dog"], [b""] * 2, None)
    assert figures.top_1 == 0.5
