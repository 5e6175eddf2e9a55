"""Scaling of a whole image into the square that a vision model reads, and of boxes and masks back to the image."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FILLING = (128, 128, 128)
"""Colour, in RGB, of the pixels that fill an image up to a square."""


class Fit(NamedTuple):
    """Place of a whole image in the square that the model reads: it is scaled to fit, and lies at the top left."""

    scale: float
    width: int
    """Width of the scaled image in pixels."""
    height: int

    @classmethod
    def of_image(cls, width: int, height: int, size: int) -> "Fit":
        """Return the place of an image of this width and height in a square of `size` x `size` pixels."""
        scale = size / max(width, height)
        return cls(scale, max(1, round(width * scale)), max(1, round(height * scale)))


def fit_pixels(image: "Image.Image", size: int) -> np.ndarray:
    """Return a whole image, scaled into a square and filled up with grey, uint8 (size, size, 3)."""
    from PIL import Image

    fit = Fit.of_image(*image.size, size)
    canvas = Image.new("RGB", (size, size), FILLING)
    canvas.paste(image.resize((fit.width, fit.height), Image.Resampling.BICUBIC))
    return np.asarray(canvas)


def stored_boxes(box_O4: np.ndarray, width: int, height: int, fit: Fit) -> np.ndarray:
    """Convert boxes from the pixels that the model reads to those of the stored image, (objects, 4) float64."""
    edges = np.array([width, height] * 2)
    scale = edges / np.array([fit.width, fit.height] * 2)
    boxes: np.ndarray = np.clip(box_O4.astype(np.float64) * scale, 0, edges)
    return boxes


def stored_probabilities(mask_YX: np.ndarray, width: int, height: int, fit: Fit) -> np.ndarray:
    """Scale an object's probabilities from the model's square to the stored image, float32 (height, width)."""
    from PIL import Image

    part = Image.fromarray(mask_YX[: fit.height, : fit.width].astype(np.float32))
    return np.asarray(part.resize((width, height), Image.Resampling.BILINEAR))
