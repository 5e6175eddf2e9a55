"""The interface of the modules that compute a router's logits."""

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from mhmoe_ray.spec import MoESpec


class BaseScores(nn.Module, ABC):
    """Module that computes a router's logits."""

    @abstractmethod
    def __init__(self, width: int, moe: MoESpec) -> None:
        """Create uninitialized parameters for rows of width D."""
        super().__init__()

    @abstractmethod
    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the logits of rows, of shape (N, E), in float32 or wider."""

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """Return the probabilities NE for the balancing loss, by default `probability_NE`."""
        return probability_NE


class Scores(Protocol):
    """Callable with the interface of `BaseScores`."""

    def __call__(self, x_ND: Tensor) -> Tensor: ...

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor: ...
