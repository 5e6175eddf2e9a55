"""What predicting a text cost: loss, perplexity, bits per byte."""

import math
from typing import Self

from pydantic import BaseModel

from mhmoe_ray.runs import metrics


class Score(BaseModel):
    nats: float = 0.0
    """Sum of the tokens' losses."""
    tokens: int = 0
    """Predicted."""
    text_bytes: int = 0
    """Of the predicted tokens, UTF-8."""
    unknown: int = 0
    """Of the predicted tokens, those that stand for any text."""

    def __add__(self, other: Self) -> "Score":
        return Score(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
            unknown=self.unknown + other.unknown,
        )

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float | None:
        return metrics.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, which losses per token are not. None where nobody knows how many bytes these
        are."""
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
