"""The score of a text that a model predicted: loss, perplexity, bits per byte."""

import math
from typing import Self

from pydantic import BaseModel

from mhmoe_ray.runs import metrics


class Score(BaseModel):
    """Score of a model's predictions of a text, as sums over its tokens. Scores of several texts add up with `+`."""

    nats: float = 0.0
    """Sum of the tokens' losses, in nats."""
    tokens: int = 0
    """Number of predicted tokens."""
    text_bytes: int = 0
    """Number of UTF-8 bytes of the predicted tokens, except unknown tokens."""
    unknown: int = 0
    """Number of predicted tokens that are the unknown token, which stands for any text."""

    def __add__(self, addend: Self) -> "Score":
        return Score(
            nats=self.nats + addend.nats,
            tokens=self.tokens + addend.tokens,
            text_bytes=self.text_bytes + addend.text_bytes,
            unknown=self.unknown + addend.unknown,
        )

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the tokens, e to the power of `loss`; None if it is larger than any float."""
        return metrics.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits per byte of text, which is comparable between tokenizers; the loss per token is not.

        It is None if the text has no bytes, or if it has unknown tokens, whose bytes are not known.
        """
        if self.unknown or not self.text_bytes:
            return None
        return self.nats / math.log(2) / self.text_bytes

    def figures(self) -> dict[str, float | None]:
        """Return the figures that reports and JSON outputs show."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
        }
