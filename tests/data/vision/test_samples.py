"""Tests of the samples of vision models: crops and fits of objects against the same operation on pixels."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from mhmoe_ray.data.images.annotations import Annotation, Instance, pack
from mhmoe_ray.data.images.files import decode_image, image_size
from mhmoe_ray.data.shards.columns import ANNOTATION, IMAGE
from mhmoe_ray.families.vision.data.fit import Fit, fit_pixels
from mhmoe_ray.families.vision.data.samples import TaskSampleMaker
from tests.support.images import encode_image
from tests.support.instances import NAMES, instance, square_mask
from tests.support.visions import vision_spec


def detect(image, annotation, label=None, **changes):
    """Return the samples of detection of one image, as the model reads 32 x 32 pixels; `label` asks for a crop."""
    spec = vision_spec(**changes)
    stored = {IMAGE: [image], ANNOTATION: [pack(annotation)]}
    maker = TaskSampleMaker(spec, {"detect": NAMES})
    return maker.make(spec.parts[1], stored, [label or ""], crops=label is not None)


def image_with(mask):
    """Return an image file that is red where the mask is, and grey elsewhere."""
    pixels = np.full((*mask.shape, 3), 90, np.uint8)
    pixels[mask] = (250, 0, 0)
    return encode_image(pixels)


def red_pixels(pixels):
    return (pixels[..., 0] > 170) & (pixels[..., 1] < 45)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("label", [f"detect {number}" for number in range(6)])
def test_boxes_and_masks_of_a_crop_are_those_of_its_pixels(label, flip):
    mask = square_mask(80, 120, 20, 40, 36)
    annotation = Annotation(instances=(instance(mask),))
    samples = detect(image_with(mask), annotation, label, data__images={"min_crop": 0.6, "flip": flip})
    [objects] = samples.objects
    seen_mask = red_pixels(samples.images[0])
    if not len(objects.boxes):
        assert seen_mask.sum() < 0.35 * 36 * 36 * 32 * 32 / (80 * 120 * 0.6)
        return
    [box], [found_mask] = objects.boxes, objects.masks
    assert objects.classes.tolist() == [2]
    # Interpolation blurs the edge by a pixel at most.
    assert (found_mask != seen_mask).sum() <= 4 * 32
    rows, columns = np.flatnonzero(seen_mask.any(1)), np.flatnonzero(seen_mask.any(0))
    assert np.abs(box - [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).max() <= 1.5


def test_evaluation_scales_whole_images_into_the_square():
    mask = square_mask(40, 80, 10, 20, 20)
    samples = detect(image_with(mask), Annotation(instances=(instance(mask, "circle"),)))
    assert samples.images.shape == (1, 32, 32, 3)
    assert np.all(samples.images[0, 16:] == 128)
    [objects] = samples.objects
    assert objects.boxes.tolist() == [[8, 4, 16, 12]]
    assert objects.masks[0].sum() == 64
    assert Fit.of_image(80, 40, 32) == (0.4, 32, 16)
    # Proportions are also kept for images that are higher than wide, and small images are enlarged.
    assert Fit.of_image(10, 20, 32) == (1.6, 16, 32)
    assert fit_pixels(Image.new("RGB", (1, 500)), 32).shape == (32, 32, 3)


def test_objects_of_crowds_and_slivers_are_left_out():
    visible, crowd = square_mask(64, 64, 4, 4, 20), square_mask(64, 64, 30, 30, 20)
    tiny = square_mask(64, 64, 60, 60, 2)
    annotation = Annotation(instances=(instance(visible), instance(crowd, is_crowd=True), instance(tiny, "ring")))
    [objects] = detect(image_with(visible), annotation).objects
    assert objects.classes.tolist() == [2]


def test_an_object_with_a_box_alone_is_read_for_a_detector_without_masks():
    changes = {"model__vision__tasks__detect__detector__masks": False}
    box_only = Instance("ring", (16.0, 8.0, 48.0, 40.0), None)
    image = image_with(square_mask(64, 64, 8, 16, 32))
    [objects] = detect(image, Annotation(instances=(box_only,)), **changes).objects
    assert objects.boxes.tolist() == [[8, 4, 24, 20]]
    assert objects.masks.shape == (0, 32, 32)


def test_classes_have_the_numbers_of_the_names_of_the_task():
    spec = vision_spec()
    class_maker = TaskSampleMaker(spec, {"classify": ["ant", "bee", "cat"]})
    images = [encode_image(np.full((20, 30, 3), value, np.uint8)) for value in (10, 90, 170)]
    stored = {IMAGE: images, ANNOTATION: [pack(Annotation(name)) for name in ("cat", "ant", "cat")]}
    samples = class_maker.make(spec.parts[0], stored, [""] * 3, crops=False)
    assert samples.classes.tolist() == [2, 0, 2]
    assert samples.images.shape == (3, 16, 16, 3)
    assert samples.images[:, 8, 8, 0].tolist() == [10, 90, 170]


# The orientation is a value of the type SHORT (3). The others are ASCII, LONG, RATIONAL, two values of SHORT, FLOAT.
@pytest.mark.parametrize(
    ("value_type", "count", "value"),
    [
        *((3, 1, struct.pack("<H", number)) for number in (*range(10), 255, 65535)),
        (2, 4, b"6666"),
        (4, 1, struct.pack("<I", 6)),
        (5, 1, struct.pack("<2I", 6, 1)),
        (5, 1, struct.pack("<2I", 6, 0)),
        (3, 2, struct.pack("<2H", 6, 1)),
        (11, 1, struct.pack("<f", 6.5)),
    ],
)
def test_the_size_of_an_image_is_that_of_its_decoded_pixels(value_type, count, value):
    # The block has one entry, whose value follows the block if it has more than four bytes.
    field = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 26)
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, value_type, count) + field + bytes(4) + value
    sink = io.BytesIO()
    Image.new("RGB", (30, 20)).save(sink, "JPEG", exif=exif)
    assert image_size(sink.getvalue()) == decode_image(sink.getvalue()).size
