"""Requests to the engine of vision models, and its answers."""

from typing import NamedTuple

import numpy as np


class VisionRequest(NamedTuple):
    """Request for the model's outputs for an image in one of its tasks."""

    task: str
    image: np.ndarray
    """Image as the model reads it, uint8 (size, size, 3)."""
    has_routes: bool = False
    """True if the answer must include the experts that the image's patches chose."""


class DetectedObjects(NamedTuple):
    """Objects that the model detected in an image, the most certain ones first."""

    box_O4: np.ndarray
    """Left, top, right and bottom edge of each object, in pixels of the square image that the model reads."""
    class_O: np.ndarray
    """Index of each object's class, from 0, in the order of the model's outputs."""
    score_O: np.ndarray
    box_mask_OYX: np.ndarray
    """Probability that each cell of a grid over a box belongs to the object; empty if the detector has no masks."""


class VisionOutput(NamedTuple):
    """Answer of the engine to one request: the logits of classes, or the detected objects."""

    logits_C: np.ndarray | None = None
    """Logits of the task's classes, float32; None for a task with a detector."""
    objects: DetectedObjects | None = None
    """Detected objects; None for a task of classification."""
    expert_LPHK: np.ndarray | None = None
    """Chosen experts by layer, patch, head and preference; None if not requested, and for a model without experts."""
