"""Boxes and masks in the pixels of an image as it is stored, from those in the square that a vision model reads."""

import numpy as np

from mhmoe_ray.data.vision_samples import Fit


def stored_boxes(box_O4: np.ndarray, width: int, height: int, fit: Fit) -> np.ndarray:
    """Return boxes in a stored image, (objects, 4) float64.

    Args:
        box_O4: left, top, right and bottom edges in the pixels that the model reads.
        width, height: size of the stored image.
        fit: place of the image in the square that the model reads.
    """
    edges = np.array([width, height] * 2)
    scale = edges / np.array([fit.width, fit.height] * 2)
    boxes: np.ndarray = np.clip(box_O4.astype(np.float64) * scale, 0, edges)
    return boxes


def stored_probabilities(mask_YX: np.ndarray, width: int, height: int, fit: Fit) -> np.ndarray:
    """Return the probability that each pixel of a stored image belongs to an object, float32 (height, width).

    Args:
        mask_YX: these probabilities in the square that the model reads.
        width, height: size of the stored image.
        fit: place of the image in that square.
    """
    from PIL import Image

    part = Image.fromarray(mask_YX[: fit.height, : fit.width].astype(np.float32))
    return np.asarray(part.resize((width, height), Image.Resampling.BILINEAR))
