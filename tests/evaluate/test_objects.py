"""Tests of the average precision of objects, and of detections in the pixels of stored images."""

import numpy as np
import pytest
import torch

from mhmoe_ray.data.images.annotations import Annotation, decode_mask
from mhmoe_ray.families.vision.data.fit import Fit, stored_probabilities
from mhmoe_ray.families.vision.evaluate.objects import StoredDetection, average_precision, stored_detection
from mhmoe_ray.families.vision.model import Detection
from tests.support.images import encode_image
from tests.support.instances import NAMES, instance, square_mask

IMAGE = encode_image(np.zeros((48, 64, 3), np.uint8))
TRUTH = [
    Annotation(
        instances=(instance(square_mask(48, 64, 4, 4, 16), "circle"), instance(square_mask(48, 64, 24, 30, 20)))
    ),
    Annotation(instances=(instance(square_mask(48, 64, 10, 10, 24), "ring"),)),
]


def detection_of(annotation, names=NAMES, shift=0.0, score=0.9):
    """Return the objects of an annotation as detections, with their boxes shifted to the right by `shift` pixels."""
    masks = [i.mask.encode() for i in annotation.instances]
    boxes = np.array([i.box for i in annotation.instances]) + np.array([shift, 0, shift, 0])
    classes = np.array([names.index(i.class_name) for i in annotation.instances])
    return StoredDetection(boxes, classes, np.full(len(classes), score), masks)


def precision(detections, *, finds_masks=True):
    return average_precision([IMAGE] * len(TRUTH), TRUTH, detections, NAMES, finds_masks=finds_masks)


def test_the_truth_has_a_precision_of_one():
    result = precision([detection_of(annotation) for annotation in TRUTH])
    assert all(value == pytest.approx(1) for value in result.model_dump().values())


def test_overlaps_classes_and_misses_lower_the_precision():
    # Shifts by a fifth of the smallest object's side leave an intersection over union of at least 2 / 3.
    shifted = precision([detection_of(annotation, shift=3.2) for annotation in TRUTH])
    assert (shifted.box_ap50, shifted.mask_ap50) == pytest.approx((1, 1))
    assert shifted.box_ap75 == pytest.approx(1 / 3)
    assert 0.3 < shifted.box_ap < 0.8
    wrong_names = [NAMES[1], NAMES[2], NAMES[0]]
    wrong_result = precision([detection_of(annotation, names=wrong_names) for annotation in TRUTH])
    assert (wrong_result.box_ap50, wrong_result.any_class_box_ap50) == pytest.approx((0, 1))
    missed = precision([detection_of(TRUTH[0]), StoredDetection(np.empty((0, 4)), np.empty(0), np.empty(0), [])])
    assert missed.box_ap50 == pytest.approx(2 / 3)
    assert missed.any_class_box_ap50 == pytest.approx(2 / 3, abs=0.01)


def test_a_region_of_several_classes_is_one_object_if_classes_do_not_count():
    """The wrong class has the higher score, so that the right one is a second box at the same place."""
    result = precision(
        [
            StoredDetection(
                np.concatenate([wrong_detection.boxes, right_detection.boxes]),
                np.concatenate([(wrong_detection.classes + 1) % len(NAMES), right_detection.classes]),
                np.concatenate([wrong_detection.scores, right_detection.scores]),
                wrong_detection.masks + right_detection.masks,
            )
            for wrong_detection, right_detection in (
                (detection_of(a), detection_of(a, shift=2, score=0.5)) for a in TRUTH
            )
        ]
    )
    assert result.any_class_box_ap50 == pytest.approx(1)
    assert result.box_ap50 < 1


def test_nothing_detected_has_a_precision_of_zero():
    empty = StoredDetection(np.empty((0, 4)), np.empty(0), np.empty(0), [])
    result = precision([empty, empty])
    assert (result.box_ap50, result.mask_ap, result.mask_ap50) == (0, 0, 0)
    assert precision([empty, empty], finds_masks=False).mask_ap is None


def test_a_detection_is_scaled_to_the_pixels_of_the_stored_image():
    """The model reads an image of 64 x 48 pixels in the upper three quarters of a square of 32 x 32 pixels."""
    fit = Fit.of_image(64, 48, 32)
    mask = torch.zeros(32, 32)
    mask[4:12, 6:20] = 1
    box_mask_OYX = torch.ones(1, 28, 28)
    detection = Detection(torch.tensor([[6.0, 4, 20, 12]]), torch.tensor([1]), torch.tensor([0.7]), box_mask_OYX)
    stored = stored_detection(detection, 64, 48, 32)
    assert stored.boxes.tolist() == [[12, 8, 40, 24]]
    expected = np.zeros((48, 64), bool)
    expected[8:24, 12:40] = True
    assert np.array_equal(stored_probabilities(mask.numpy(), 64, 48, fit) >= 0.5, expected)
    mask_YX = decode_mask(stored.masks[0].decode(), 64, 48)
    assert mask_YX[expected].all()
    # torchvision rounds the edges of a mask to pixels of the square, each of which is two image pixels wide.
    expected[6:26, 10:42] = True
    assert not mask_YX[~expected].any()
    outside = Detection(
        torch.tensor([[-5.0, 2, 40, 40]]), torch.tensor([0]), torch.tensor([0.5]), torch.zeros(0, 28, 28)
    )
    assert stored_detection(outside, 64, 48, 32).boxes.tolist() == [[0, 4, 64, 48]]
