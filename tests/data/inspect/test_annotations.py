"""Tests of the reports on images with classes or objects."""

import json

import pytest

from mhmoe_ray.cli.data_inspect import survey_dict
from mhmoe_ray.cli.data_inspect_view import print_survey
from mhmoe_ray.data.inspect.lint import LintInput, lint
from mhmoe_ray.spec import DataSpec
from tests.data.inspect.surveys import survey_serially
from tests.support.images import make_images, write_image_folder

IMAGES = make_images(12, size=40)


@pytest.fixture
def data_spec(tmp_path):
    """Write images in folders of classes, one of them twice, and images with objects; return the data section."""
    write_image_folder(tmp_path / "folder" / "cat", IMAGES[:8])
    write_image_folder(tmp_path / "folder" / "dog", [*IMAGES[8:10], IMAGES[0]._replace(name="again.png")])
    write_image_folder(tmp_path / "coco", IMAGES[:3])
    objects = [
        {"id": number, "image_id": image_id, "category_id": category, "bbox": [0, 0, 9, 9]}
        for number, (image_id, category) in enumerate([(0, 1), (0, 2), (0, 1), (1, 1), (1, 7)])
    ]
    tree = {
        "images": [{"id": number, "file_name": image.name} for number, image in enumerate(IMAGES[:3])],
        "annotations": objects,
        "categories": [{"id": 1, "name": "boat"}, {"id": 2, "name": "moon"}],
    }
    (tmp_path / "coco" / "instances.json").write_text(json.dumps(tree))
    sources = {
        "classes": {"path": str(tmp_path / "folder"), "format": "images", "columns": ["image", "class"]},
        "objects": {"path": str(tmp_path / "coco"), "format": "coco", "columns": ["image", "objects"]},
    }
    tree = {"sources": sources, "prepared": str(tmp_path / "prepared"), "seq_len": 8, "validation_fraction": 0.4}
    return DataSpec.model_validate(tree | {"max_bad_lines": 1})


def test_the_report_has_classes_and_objects(data_spec, capsys):
    summary = {"name": "vision", **survey_dict(survey_serially(data_spec)), "prepared": None}
    classes, objects = (summary["domains"][f"{name}/all"]["images"] for name in ("classes", "objects"))
    assert classes["classes"] == {"cat": 8, "dog": 3}
    assert "objects_per_image" not in classes
    assert objects["classes"] == {"boat": 3, "moon": 1}
    assert objects["objects_per_image"]["octaves"] == {0: 1, 1: 1, 2: 1}
    assert (classes["images"], objects["images"]) == (11, 3)
    json.dumps(summary)
    print_survey(summary, held_out=True)
    assert "classes with their images or objects" in capsys.readouterr().out


def test_lint_finds_bad_objects_and_copies(data_spec):
    problems = lint(LintInput(survey_serially(data_spec), data_spec, None, None))
    assert [
        (problem.rule, problem.subject, problem.count) for problem in problems if problem.rule != "shared-texts"
    ] == [
        ("unreadable", "objects/all", 1),
        ("copies", "classes/all", 1),
    ]
    assert problems[0].examples[0][1] == "annotation 4: category_id 7 is not among the categories with a name"
