"""Requests to the engine of encoders, and its answers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.serving.engine import FinishReason

MAX_DOCUMENTS = 2048
"""Largest number of inputs of /v1/embeddings, and of documents of /rerank, in a request."""


class EncodeRequest(NamedTuple):
    """Request for the vector of an image or a text, or for the caption of an image."""

    image: np.ndarray | None = None
    """Image as the model reads it, uint8 (size, size, 3); None for a text."""
    token_ids: Sequence[int] = ()
    """Tokens of a text, with the start token; for an image, the tokens of its caption so far."""
    max_tokens: int | None = None
    """Largest number of tokens of the caption of the image; None asks for a vector."""

    @property
    def is_caption(self) -> bool:
        """True if the request is for a caption."""
        return self.max_tokens is not None


class Encoding(NamedTuple):
    """Answer of the engine to one request: a vector or a caption."""

    vector_W: np.ndarray | None = None
    """Vector of length 1, float32; None for a caption."""
    caption_ids: list[int] | None = None
    """Tokens of a caption, without the start token at its beginning and end; None for a vector."""
    finish_reason: FinishReason | None = None
    """Reason why a caption ends; None for a vector."""
    expert_LSH: np.ndarray | None = None
    """First-choice experts of an image by layer, position and head; None for other requests and without experts."""
