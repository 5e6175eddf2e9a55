"""The router: scores of E experts for each row (routers/), and the choice among them. All in float32 or wider."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mhmoe_kernels import wide
from mhmoe_ray.model.balance import balance_loss, route_counts, z_loss
from mhmoe_ray.model.capacity import fits
from mhmoe_ray.model.routers import scores
from mhmoe_ray.spec import MoESpec


class Routing(NamedTuple):
    """Where N rows go."""

    expert_NK: Tensor
    """int64; first choice first, no expert twice in a row."""
    gate_NK: Tensor
    """Weights of the chosen experts, float32; 0 for a route that is not kept."""
    balance_loss: Tensor
    """Scalar; 1 when routing is uniform."""
    z_loss: Tensor
    """Scalar."""
    count_E: Tensor
    """Kept routes per expert, int64."""
    dropped: Tensor
    """Routes that found no place, int64 scalar; second choices that `second_expert: random` leaves out want none."""
    places: int | None
    """Rows that an expert takes at most, where routing is static; None where it is dropless."""


class Router(nn.Module):
    """softmax of the scores, then the top k."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__()
        self.moe = moe
        self.scores = scores(width, moe)
        if moe.bias_rate:
            self.bias_E: Tensor
            self.register_buffer("bias_E", torch.zeros(moe.experts))

    def forward(self, x_ND: Tensor, generator: torch.Generator | None = None) -> Routing:
        """Args:
        x_ND: rows.
        generator: source of jitter and of P1's random second expert; without one there is neither.
        """
        with torch.autocast(x_ND.device.type, enabled=False):
            return self._route(wide(x_ND), generator)

    def _route(self, x_ND: Tensor, generator: torch.Generator | None) -> Routing:
        moe, rows = self.moe, len(x_ND)
        if moe.jitter and generator is not None:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - moe.jitter, 1 + moe.jitter, generator=generator)
        logits_NE = self.scores(x_ND)
        expert_NK, gate_NK, probability_NE = self.choose(logits_NE)
        places = moe.places(rows) if self.training else None
        wanted_NK = self._wanted(expert_NK, gate_NK, generator)
        kept_NK = wanted_NK if places is None else fits(expert_NK, wanted_NK, moe.experts, places)
        count_E = route_counts(expert_NK, moe.experts, kept_NK)
        counted = expert_NK[:, :1] if moe.balance_choices == "first" else expert_NK
        return Routing(
            expert_NK,
            gate_NK * kept_NK,
            balance_loss(self.scores.balanced(x_ND, probability_NE), counted) if rows else logits_NE.sum(),
            z_loss(logits_NE) if rows else logits_NE.sum(),
            count_E,
            wanted_NK.sum() - count_E.sum(),
            places,
        )

    def choose(self, logits_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The top k of each row.

        Args:
            logits_NE: what `scores` gives.

        Returns:
            expert_NK and gate_NK as in `Routing`, before any drop; and the probabilities NE.
        """
        moe = self.moe
        probability_NE = logits_NE.softmax(-1)
        # The bias takes part in the choice only; weights are the router's own.
        preferred_NE = probability_NE + self.bias_E if moe.bias_rate else probability_NE
        expert_NK = preferred_NE.topk(moe.top_k, dim=-1).indices
        if moe.normalize_gates:
            # Equal to dividing the chosen probabilities by their sum, which is 0 where a bias chose experts whose
            # probabilities have all underflowed.
            gate_NK = logits_NE.gather(-1, expert_NK).softmax(-1)
        else:
            gate_NK = probability_NE.gather(-1, expert_NK)
        return expert_NK, gate_NK, probability_NE

    def _wanted(self, expert_NK: Tensor, gate_NK: Tensor, generator: torch.Generator | None) -> Tensor:
        """Mask NK of the routes that are to have a place."""
        wanted_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        if self.moe.second_expert == "random" and generator is not None:
            u_N = torch.rand(len(gate_NK), device=gate_NK.device, dtype=gate_NK.dtype, generator=generator)
            wanted_NK[:, 1] = 2 * gate_NK[:, 1] > u_N
        return wanted_NK
