"""The interfaces of routers and of the modules that compute their logits."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mhmoe_ray.spec import MoESpec


class Routing(NamedTuple):
    """Result of a router for N rows."""

    expert_NK: Tensor  # chosen experts, int64, in the order of preference, all different
    gate_NK: Tensor  # weights of the chosen experts, float32; 0 for a dropped route
    balance_loss: Tensor  # of the layer, scalar; the default loss (`balance: shares`) is 1 if routing is uniform
    z_loss: Tensor  # of the layer, scalar
    count_E: Tensor  # kept routes per expert, int64
    dropped_routes: Tensor
    """Routes beyond the expert capacity, int64 scalar, without those that `second_expert: random` leaves out."""
    capacity: int | None  # expert capacity in rows; None if there is no limit


def routing_without_losses(expert_NK: Tensor, gate_NK: Tensor, count_E: Tensor) -> Routing:
    """Return a routing that drops no routes and has losses of 0."""
    zero = torch.zeros((), device=gate_NK.device)
    return Routing(expert_NK, gate_NK, zero, zero, count_E, count_E.new_zeros(()), None)


class RoutingContext(NamedTuple):
    """Context of the rows of a layer, which only some routers read."""

    sequences: int = 1
    """Number of sequences, whose rows lie one after another."""
    domain_B: Tensor | None = None
    """Expert of each sequence, int64, for router `domain`."""
    group_rows: Sequence[int] = ()
    """Number of rows of each modality or task, one after another."""


NO_CONTEXT = RoutingContext()


class BaseRouter(nn.Module, ABC):
    """Router of one layer, which chooses the experts of each row."""

    def __init__(self, moe: MoESpec) -> None:
        super().__init__()
        self.moe = moe

    @abstractmethod
    def forward(
        self, x_ND: Tensor, generator: torch.Generator | None = None, context: RoutingContext = NO_CONTEXT
    ) -> Routing:
        """Choose the experts of rows.

        Args:
            x_ND: the rows, of width D.
            generator: random generator of all that is random in training, such as noise; None disables it.
            context: the context of the rows.
        """


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
