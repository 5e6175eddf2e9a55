"""The columns of an encoder's samples in memory."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.spec import MicroBatchPart


class EncoderSamples(NamedTuple):
    """Samples of an encoder for one or several parts of a micro-batch; a part has an objective and data of its own.

    Images and texts are in the order of the parts.
    """

    images: np.ndarray
    """Cropped images, (images, size, size, 3) uint8."""
    patch_hidden: np.ndarray
    """Mask of the patches that are hidden from the model, (images, patches) bool."""
    tokens: np.ndarray
    """Tokens of the texts as a shard stores them, with padding, (texts, T)."""
    inputs: np.ndarray
    """Tokens of the texts as the model reads them, (texts, T): most of the hidden ones are replaced."""
    token_predicted: np.ndarray
    """Mask of the positions at which the model predicts a token, (texts, T) bool: hidden tokens, or in a caption every
    position from which the next token or the end is predicted."""

    @classmethod
    def join(cls, parts: Sequence["EncoderSamples"]) -> "EncoderSamples":
        """Return the samples of several parts of a micro-batch as one object, one part after another."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    @property
    def sample_count(self) -> int:
        """The number of samples. It must be read only if all samples belong to one part, that is, to one objective."""
        return max(len(self.images), len(self.tokens))

    def rows(self, part: MicroBatchPart, start: int, stop: int) -> "EncoderSamples":
        """Return samples `start` to `stop` - 1 of a part; all samples of this object must belong to this part."""
        image_rows, text_rows = (slice(start, stop) if name in part.columns else slice(0) for name in ("image", "text"))
        return EncoderSamples(*(column[image_rows] for column in self[:2]), *(column[text_rows] for column in self[2:]))
