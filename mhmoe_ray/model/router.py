"""Routers: scores of E experts for each row, and the choice among them. All in float32 or wider."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import wide
from mhmoe_ray.model.balance import balance_loss, route_counts, z_loss
from mhmoe_ray.model.capacity import fits
from mhmoe_ray.spec import MoESpec


class Routing(NamedTuple):
    """Where N rows go."""

    expert_NK: Tensor
    """int64; first choice first, no expert twice in a row."""
    gate_NK: Tensor
    """Weights of the chosen experts, float32; 0 for a route that was dropped."""
    balance_loss: Tensor
    """Scalar; 1 when routing is uniform."""
    z_loss: Tensor
    """Scalar."""
    count_E: Tensor
    """Kept routes per expert, int64."""
    dropped: Tensor
    """Routes that were not kept, int64 scalar."""
    places: int | None
    """Rows that an expert takes at most, where routing is static; None where it is dropless."""


class LinearScores(nn.Module):
    """W x (P1, equation 5; P2, section 2.1)."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(torch.empty(moe.experts, width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ wide(self.weight_ED).T


class XMoEScores(nn.Module):
    """cos(W x, e) / tau with a learnable temperature tau, as published (X-MoE, arXiv 2204.09179).

    How tau is held is not published. As a plain parameter it can reach 0 within 500 steps of Adam at a learning rate of
    6e-4; there scores are infinite, and past it their order is reversed. So the parameter is log(tau - lowest): tau
    falls by a share of itself, and never below Tutel's bound (a scale of at most 100).
    """

    INITIAL_TEMPERATURE = 0.3
    LOWEST_TEMPERATURE = 0.01

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__()
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))
        self.log_temperature = nn.Parameter(torch.empty(()))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.cosine(x_ND) / self.temperature

    @property
    def temperature(self) -> Tensor:
        return self.LOWEST_TEMPERATURE + wide(self.log_temperature).exp()

    def cosine(self, x_ND: Tensor) -> Tensor:
        return F.normalize(x_ND @ wide(self.reduce_QD).T, dim=-1) @ F.normalize(wide(self.expert_EQ), dim=-1).T


class TorchscaleScores(nn.Module):
    """W x . e / |e| in 16 dimensions: what torchscale computes under X-MoE's name, and P1 ran. The row's side is not
    normalised and there is no temperature."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__()
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ wide(self.reduce_QD).T @ F.normalize(wide(self.expert_EQ), dim=-1, eps=1e-4).T


SCORES = {"linear": LinearScores, "xmoe": XMoEScores, "xmoe_torchscale": TorchscaleScores}


class Router(nn.Module):
    """softmax of the scores, then the top k."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__()
        self.moe = moe
        self.scores: nn.Module = SCORES[moe.router](width, moe)
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
        kept_NK = self._kept(expert_NK, gate_NK, places, generator)
        count_E = route_counts(expert_NK, moe.experts, kept_NK)
        counted = expert_NK[:, :1] if moe.balance_choices == "first" else expert_NK
        return Routing(
            expert_NK,
            gate_NK * kept_NK,
            balance_loss(self._balanced(x_ND, probability_NE), counted) if rows else logits_NE.sum(),
            z_loss(logits_NE) if rows else logits_NE.sum(),
            count_E,
            expert_NK.numel() - count_E.sum(),
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

    def _kept(
        self, expert_NK: Tensor, gate_NK: Tensor, places: int | None, generator: torch.Generator | None
    ) -> Tensor:
        moe = self.moe
        kept_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        if moe.second_expert == "random" and generator is not None:
            u_N = torch.rand(len(gate_NK), device=gate_NK.device, dtype=gate_NK.dtype, generator=generator)
            kept_NK[:, 1] = 2 * gate_NK[:, 1] > u_N
        if places is not None:
            kept_NK = fits(expert_NK, kept_NK, moe.experts, places)
        return kept_NK

    def _balanced(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """X-MoE's loss divides by the initial temperature, not by the learnt one, which could otherwise grow to please
        it."""
        if isinstance(self.scores, XMoEScores):
            return (self.scores.cosine(x_ND) / XMoEScores.INITIAL_TEMPERATURE).softmax(-1)
        return probability_NE
