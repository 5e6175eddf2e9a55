"""Tests of the check that each task of a vision model has images, outputs for its classes, and the masks it needs."""

import pytest

from mhmoe_ray.data.prepare.parts import PartCounts, RowCounts, TokenisedPart
from mhmoe_ray.errors import DataError
from mhmoe_ray.families.vision.data.rows import classes_of_tasks
from tests.support.visions import vision_spec

DRAWINGS = {"samples": 9, "held_out_samples": 2, "class_names": ["red", "blue"]}
SCENES = {"samples": 5, "held_out_samples": 1, "class_names": ["dog", "cat", "cow"]}


def classes(drawings: dict, scenes: dict) -> dict[str, list[str]]:
    """Return the classes of each task of `vision_spec`; the arguments are changes to the counts of its two domains."""
    counts = {"drawings/all": DRAWINGS | drawings, "scenes/all": SCENES | scenes}
    by_domain = {
        name: [TokenisedPart(0, 0, "part", PartCounts(rows=RowCounts(**keywords)))] for name, keywords in counts.items()
    }
    return classes_of_tasks(vision_spec(), by_domain)


def test_classes_of_tasks_are_sorted():
    assert classes({}, {}) == {"classify": ["blue", "red"], "detect": ["cat", "cow", "dog"]}


@pytest.mark.parametrize(
    ("drawings", "scenes", "message"),
    [
        ({"samples": 0}, {}, "task classify: it has no training images"),
        ({}, {"held_out_samples": 0}, "task detect: it has no held-out images"),
        ({}, {"class_names": []}, "task detect: its images have no objects; add annotations"),
        ({}, {"class_names": list("abcd")}, "its head has 3 outputs; raise model.vision.tasks.detect.classes to 4"),
        ({}, {"objects_without_mask": 2}, "task detect: 2 of its objects have no mask; add masks, or set"),
    ],
)
def test_images_that_a_task_cannot_use_are_refused(drawings, scenes, message):
    with pytest.raises(DataError, match=message):
        classes(drawings, scenes)
