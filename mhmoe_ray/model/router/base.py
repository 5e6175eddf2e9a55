"""The interface of the modules that compute a router's logits."""

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from mhmoe_ray.spec import MoESpec


class BaseScores(nn.Module, ABC):
    """Module that computes a router's logits; the base class of all kinds."""

    @abstractmethod
    def __init__(self, width: int, moe: MoESpec) -> None:
        """Create uninitialized parameters for rows of width D."""
        super().__init__()

    @abstractmethod
    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the logits of rows, of shape (N, E), in float32 or wider."""

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """Return the probabilities NE for the load balancing loss; by default `probability_NE`, normalized scores."""
        return probability_NE


class Scores(Protocol):
    """Callable that computes router logits, and probabilities for the load balancing loss, as `BaseScores` does."""

    def __call__(self, x_ND: Tensor) -> Tensor: ...

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor: ...
