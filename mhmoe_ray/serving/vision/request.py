"""Requests to the engine of vision models, and its answers."""

from typing import NamedTuple

import numpy as np


class VisionRequest(NamedTuple):
    """Request for the outputs of a task for an image."""

    task: str
    image: np.ndarray
    """Image as the model reads it, uint8 (size, size, 3)."""
    has_routes: bool = False
    """True if the experts of its patches are asked for."""


class DetectedObjects(NamedTuple):
    """Objects in the square that the model reads, the most certain ones first."""

    box_O4: np.ndarray
    """Left, top, right and bottom edges."""
    class_O: np.ndarray
    """Numbers of their classes."""
    score_O: np.ndarray
    box_mask_OYX: np.ndarray
    """Probabilities of masks in the boxes; with no rows if the detector has no masks."""


class VisionOutput(NamedTuple):
    """Answer to a request."""

    logits_C: np.ndarray | None = None
    """Logits of classes, float32; None for detection."""
    objects: DetectedObjects | None = None
    """Objects; None for classification."""
    expert_LPHK: np.ndarray | None = None
    """Experts of each sub-token of each patch in each layer with experts, the preferred ones first; None if the request
    does not ask for them, and without experts."""
