"""The columns of an encoder's samples in memory."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class EncoderSamples(NamedTuple):
    """Samples of an encoder for one or several parts of a micro-batch, in the order of the parts.

    A sentence about two images has two neighbouring rows of images, and two equal rows of texts.
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
    """Mask, (texts, T) bool: hidden tokens, or in captions the positions that predict the next token or the end."""
    labels: np.ndarray
    """Classes of questions and sentences, (questions, 10) int64, and -1 for none: the annotators' answers, or first the
    truth of a sentence. Samples of other parts have no row."""

    @classmethod
    def join(cls, parts: Iterable["EncoderSamples"]) -> "EncoderSamples":
        """Join the samples of several parts of a micro-batch, one part after another."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    @property
    def sample_count(self) -> int:
        """The number of samples, all of which must belong to one part."""
        return len(self.labels) or max(len(self.images), len(self.tokens))

    def rows(self, start: int, stop: int) -> "EncoderSamples":
        """Return samples `start` to `stop` - 1; all samples must belong to one part."""
        # A column that the part does not have is empty, and so is any slice of it.
        size = len(self.images) // len(self.labels) if len(self.labels) else 1
        rows = EncoderSamples(*(column[size * start : size * stop] for column in self))
        return rows._replace(labels=self.labels[start:stop])
