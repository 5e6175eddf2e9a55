"""How well a text was predicted: loss, perplexity, bits per byte."""

import math
from typing import Self

from pydantic import BaseModel

from mhmoe_ray.runs import metrics


class Score(BaseModel):
    nats: float = 0.0
    """Sum of the tokens' losses, in nats."""
    tokens: int = 0
    """Number of predicted tokens."""
    text_bytes: int = 0
    """Number of UTF-8 bytes of the predicted tokens, without unknown ones."""
    unknown: int = 0
    """Number of predicted tokens that are the unknown token, which stands for any text."""

    def __add__(self, other: Self) -> "Score":
        return Score(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
            unknown=self.unknown + other.unknown,
        )

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float | None:
        return metrics.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, which are comparable between tokenizers; losses per token are not.

        None if the number of bytes is not known, because some tokens are unknown ones, or if it is 0.
        """
        if self.unknown or not self.text_bytes:
            return None
        return self.nats / math.log(2) / self.text_bytes

    def figures(self) -> dict[str, float | None]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
        }
