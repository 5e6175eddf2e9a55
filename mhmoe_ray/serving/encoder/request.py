"""Requests to the engine of encoders, and its answers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class EncodeRequest(NamedTuple):
    """Request for the vector of an image or a text, or for the caption of an image."""

    image: np.ndarray | None = None
    """Image as the model reads it, uint8 (size, size, 3); None for a text."""
    token_ids: Sequence[int] = ()
    """Tokens of a text, with the start token; empty for an image."""
    is_caption: bool = False
    """True if a caption of the image is asked for instead of its vector."""


class Encoding(NamedTuple):
    """Answer to a request."""

    vector_W: np.ndarray | None = None
    """Vector of length 1, float32; None for a caption."""
    caption_ids: list[int] | None = None
    """Tokens of a caption without start and end; None for a vector."""
    expert_LSH: np.ndarray | None = None
    """First choice of each sub-token of each position of an image, in each layer with experts; None for a text, and
    without experts."""
