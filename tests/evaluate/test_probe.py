"""Tests of the linear probe."""

import numpy as np
import pytest

from mhmoe_ray.families.encoder.evaluate.probe import classify
from tests.support.images import encode_image

COLOURS = {b"red": (255, 0, 0), b"green": (0, 255, 0), b"blue": (0, 0, 255)}


def make_images(rng, count):
    """Return images whose colours are those of their classes, and the classes."""
    classes = [list(COLOURS)[number % 3] for number in range(count)]
    images = [
        encode_image(np.clip(np.array(COLOURS[name]) + rng.integers(-60, 60, (4, 4, 3)), 0, 255).astype(np.uint8))
        for name in classes
    ]
    return images, classes


def test_a_probe_and_the_nearest_image_name_separable_classes():
    rng = np.random.default_rng(0)
    (training_images, training_classes), (images, classes) = make_images(rng, 60), make_images(rng, 30)
    codes = {name: rng.normal(size=8) for name in COLOURS}

    def features(names):
        return np.stack([codes[name] + 0.1 * rng.normal(size=8) for name in names])

    score = classify(features(training_classes), training_images, training_classes, features(classes), images, classes)
    assert (score.accuracy, score.baseline, score.classes) == (1, 1, 3)
    assert score.largest_class == pytest.approx(1 / 3)
    noise = classify(
        rng.normal(size=(60, 8)), training_images, training_classes, rng.normal(size=(30, 8)), images, classes
    )
    assert noise.accuracy < 0.7


def test_a_class_that_was_not_trained_is_wrong():
    rng = np.random.default_rng(0)
    training_images, training_classes = make_images(rng, 30)
    images, _ = make_images(rng, 3)
    score = classify(
        rng.normal(size=(30, 4)), training_images, training_classes, rng.normal(size=(3, 4)), images, [b"black"] * 3
    )
    assert (score.accuracy, score.baseline, score.largest_class) == (0, 0, 0)
