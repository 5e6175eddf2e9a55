"""Crops of images: a random crop depends only on the image's size, the settings, a seed and the sample's label.

The label names the sample's part of a micro-batch and its position in the training.
"""

import math
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhmoe_ray.data.draws import Draws
from mhmoe_ray.data.images.files import decode_image
from mhmoe_ray.spec import ImageSpec

if TYPE_CHECKING:
    from PIL import Image

MIN_ASPECT = Decimal("0.75")
"""Smallest ratio of width to height of a crop; the largest is its inverse."""
TRIES = 10
"""Number of boxes that are drawn; if none of them fits into the image, the largest square at the centre is used."""


class Crop(NamedTuple):
    """Rectangle of an image that the model reads, perhaps mirrored left to right."""

    box: tuple[int, int, int, int]
    """Left, top, right and bottom edge in pixels."""
    is_mirrored: bool = False


def centre_crop(width: int, height: int) -> Crop:
    """Return the largest square at the centre of an image."""
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return Crop((x, y, x + side, y + side))


def random_crop(width: int, height: int, images: ImageSpec, seed: int, label: str) -> Crop:
    """Return a random crop of an image of this size in pixels, with the area and the mirroring that `images` allows."""
    draws = Draws(seed, label)
    is_mirrored = images.flip and draws.number() < 0.5
    if images.min_crop == 1:
        return centre_crop(width, height)._replace(is_mirrored=is_mirrored)
    for _ in range(TRIES):
        area = draws.between(images.min_crop, 1) * width * height
        aspect = draws.ratio(MIN_ASPECT)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            x, y = draws.integer(0, width - crop_width), draws.integer(0, height - crop_height)
            return Crop((x, y, x + crop_width, y + crop_height), is_mirrored)
    return centre_crop(width, height)._replace(is_mirrored=is_mirrored)


def read_crop(content: bytes, size: int, choose_crop: Callable[[int, int], Crop] = centre_crop) -> np.ndarray:
    """Return a crop of an encoded image, uint8 (size, size, 3); `choose_crop` takes the image's width and height."""
    return crop_pixels(decode_image(content), size, choose_crop)


def crop_pixels(image: "Image.Image", size: int, choose_crop: Callable[[int, int], Crop] = centre_crop) -> np.ndarray:
    """Return a crop of a decoded image, uint8 (size, size, 3)."""
    from PIL import Image

    crop = choose_crop(*image.size)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=crop.box))
    return pixels[:, ::-1] if crop.is_mirrored else pixels
