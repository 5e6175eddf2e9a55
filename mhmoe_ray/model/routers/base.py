"""What all scores have in common."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mhmoe_ray.spec import MoESpec


class BaseScores(nn.Module, ABC):
    @abstractmethod
    def __init__(self, width: int, moe: MoESpec) -> None:
        """Args:
        width: D of its rows.
        moe: with E.
        """
        super().__init__()

    @abstractmethod
    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits NE of rows in float32 or wider."""

    def balanced(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """The probabilities NE that the balance loss sees; those of the choice, where a router has no others."""
        return probability_NE
