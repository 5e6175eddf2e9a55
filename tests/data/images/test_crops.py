"""Tests of crops of images."""

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mhmoe_ray.families.images.crops import Crop, centre_crop, random_crop, read_crop
from mhmoe_ray.spec import ImageSpec


def many_crops(width, height, images):
    """Return the crops of 2,000 samples."""
    return [random_crop(width, height, images, 0, f"images:{position}") for position in range(2000)]


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    min_crop=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_a_crop_lies_inside_its_image(width, height, min_crop, seed):
    box = random_crop(width, height, ImageSpec(min_crop=min_crop), seed, "images:5").box
    assert 0 <= box[0] < box[2] <= width
    assert 0 <= box[1] < box[3] <= height


def test_crops_have_the_areas_and_aspect_ratios_of_the_spec():
    boxes = np.array([crop.box for crop in many_crops(300, 300, ImageSpec(min_crop=0.4))])
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).T
    shares = widths * heights / 300**2
    # Sides are rounded to whole pixels.
    assert 0.4 - 0.005 < shares.min() < 0.42
    assert 0.95 < shares.max() <= 1
    ratios = widths / heights
    assert 0.75 - 0.01 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 4 / 3 + 0.01
    # Boxes reach all edges.
    assert boxes[:, :2].min(axis=0).tolist() == [0, 0]
    assert boxes[:, 2:].max(axis=0).tolist() == [300, 300]


def test_an_image_in_which_no_box_fits_gives_the_square_at_its_centre():
    """A box of at least half the area and an aspect ratio of at most 4/3 is higher than an image of 900 x 100."""
    assert set(many_crops(900, 100, ImageSpec())) == {Crop((400, 0, 500, 100))}


def test_min_crop_1_gives_the_square_at_the_centre():
    assert centre_crop(50, 31) == Crop((9, 0, 40, 31))
    assert set(many_crops(50, 31, ImageSpec(min_crop=1))) == {centre_crop(50, 31)}


@pytest.mark.parametrize("min_crop", [0.5, 1])
def test_flip_mirrors_half_of_the_crops(min_crop):
    flips = [crop.is_mirrored for crop in many_crops(60, 40, ImageSpec(min_crop=min_crop, flip=True))]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.05)
    assert not any(crop.is_mirrored for crop in many_crops(60, 40, ImageSpec(min_crop=min_crop)))


def test_crops_depend_on_seed_and_label_only():
    """The digest of the crops is equal on all machines, because only raw bits and float64 arithmetic decide them."""
    images = ImageSpec(min_crop=0.4, flip=True)
    crops = [random_crop(320, 240, images, seed, f"images:{n}") for seed in (0, 1) for n in range(50)]
    assert len(set(crops)) == 100
    values = repr([(*crop.box, crop.is_mirrored) for crop in crops])
    assert hashlib.sha256(values.encode()).hexdigest()[:16] == "4c815faaf8ceab74"


def test_the_pixels_of_a_crop_are_those_of_its_box():
    """Each column of the image has its own grey value, so an unscaled crop has the values of its box's columns."""
    pixels = np.repeat(np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 40, axis=0), 3, axis=2)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    crop = read_crop(file.getvalue(), 20, lambda width, height: Crop((30, 5, 50, 25)))
    assert crop.shape == (20, 20, 3)
    assert (crop == np.arange(30, 50, dtype=np.uint8)[None, :, None]).all()
    mirrored = read_crop(file.getvalue(), 20, lambda width, height: Crop((30, 5, 50, 25), is_mirrored=True))
    assert (mirrored == crop[:, ::-1]).all()
    assert (read_crop(file.getvalue(), 40) == np.arange(30, 70, dtype=np.uint8)[None, :, None]).all()
