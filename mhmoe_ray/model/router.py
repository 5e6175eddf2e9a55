"""The router: scores of E experts for each row, the choice among them, capacity and balance. In float32 or wider.

Scores are W x (P1, equation 5; P2, section 2.1), X-MoE's as published, or X-MoE's as torchscale computes them and P1
ran them. Two losses and a bias keep experts equally loaded; each is of one layer; a model sums them over its layers.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import wide
from mhmoe_ray.spec import MoESpec
from mhmoe_ray.spec.model import RouterName


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


class LinearScores(BaseScores):
    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.weight_ED = nn.Parameter(torch.empty(moe.experts, width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ wide(self.weight_ED).T


INITIAL_TEMPERATURE = 0.3
LOWEST_TEMPERATURE = 0.01


class XMoEScores(BaseScores):
    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))
        self.log_temperature = nn.Parameter(torch.empty(1))  # FSDP2 and DeepSpeed take no scalars

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.cosine(x_ND) / self.temperature

    def balanced(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """X-MoE's loss divides by the initial temperature, not by the learnt one, which could otherwise grow to please
        it."""
        return (self.cosine(x_ND) / INITIAL_TEMPERATURE).softmax(-1)

    @property
    def temperature(self) -> Tensor:
        return LOWEST_TEMPERATURE + wide(self.log_temperature).exp()

    def cosine(self, x_ND: Tensor) -> Tensor:
        return F.normalize(x_ND @ wide(self.reduce_QD).T, dim=-1) @ F.normalize(wide(self.expert_EQ), dim=-1).T


class TorchscaleScores(BaseScores):
    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ wide(self.reduce_QD).T @ F.normalize(wide(self.expert_EQ), dim=-1, eps=1e-4).T


SCORES: dict[RouterName, type[BaseScores]] = {
    "linear": LinearScores,
    "xmoe": XMoEScores,
    "xmoe_torchscale": TorchscaleScores,
}


def scores(width: int, moe: MoESpec) -> BaseScores:
    """Those that the spec names, for rows of a width; not initialised."""
    return SCORES[moe.router](width, moe)


def route_counts(expert_NK: Tensor, experts: int, kept_NK: Tensor | None = None) -> Tensor:
    """Of each expert, int64; of all routes or of those kept. Not bincount, which makes the host wait for a GPU."""
    weight_NK = torch.ones_like(expert_NK) if kept_NK is None else kept_NK.long()
    zero_E = torch.zeros(experts, dtype=torch.int64, device=expert_NK.device)
    return zero_E.scatter_add_(0, expert_NK.flatten(), weight_NK.flatten())


def balance_loss(probability_NE: Tensor, expert_NK: Tensor) -> Tensor:
    """E * sum_e mean_n(p_ne) * share of the given choices that are e, before any drop (Switch Transformers, arXiv
    2101.03961, equation 4).

    With `expert_NK` cut to its first column this is the form of both papers' code; with all of it, the one of
    MegaBlocks. It is exactly 1 when either factor is uniform, at most E, and its gradient flows through the
    probabilities alone.
    """
    experts = probability_NE.shape[1]
    share_E = route_counts(expert_NK, experts).to(probability_NE.dtype) / expert_NK.numel()
    return experts * (probability_NE.mean(0) * share_E).sum()


def z_loss(logits_NE: Tensor) -> Tensor:
    """Mean over rows of the squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906); its floor is 0."""
    return logits_NE.logsumexp(-1).square().mean()


def moved_bias(bias_E: Tensor, count_E: Tensor, rate: float) -> Tensor:
    """The selection bias for the next step (auxiliary-loss-free balancing, arXiv 2408.15664): by `rate` up for experts
    with fewer routes than the mean, down for those with more."""
    load_E = count_E.to(bias_E.dtype)
    return bias_E + rate * (load_E.mean() - load_E).sign()


def fits(expert_NK: Tensor, wanted_NK: Tensor, experts: int, limit: int) -> Tensor:
    """Mask NK of the wanted routes that their experts take.

    Places are given in the order of rows, all first choices before all second ones, and so on; so a later row's first
    choice can push out an earlier row's second one, and static routing is not causal.
    """
    order_KN = torch.where(wanted_NK, expert_NK, experts).T.flatten()  # unwanted routes queue for no expert
    sorted_R, route_R = order_KN.sort(stable=True)
    start_E = torch.searchsorted(sorted_R, torch.arange(experts + 1, device=sorted_R.device))
    place_R = torch.empty_like(route_R)
    place_R[route_R] = torch.arange(len(route_R), device=route_R.device) - start_E[sorted_R]
    return wanted_NK & (limit > place_R.view(expert_NK.T.shape).T)


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
