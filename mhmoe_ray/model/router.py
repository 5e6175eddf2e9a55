"""The router: logits over E experts for each row, top-k routing, expert capacity, and load balancing, in float32 or
wider.

Logits are W x (P1, equation 5; P2, section 2.1), X-MoE's as published, or X-MoE's as torchscale computes them and P1
ran them. Two losses and a selection bias keep the load of experts equal. Each belongs to one layer; a model sums the
losses over its layers.
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
        """Create uninitialized parameters.

        Args:
            width: D, the width of a row.
            moe: spec of the layer, with its number of experts E.
        """
        super().__init__()

    @abstractmethod
    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the logits NE of rows in float32 or wider."""

    def balanced(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """Return the probabilities NE for the load-balancing loss: by default those of the routing itself."""
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
        """Return probabilities at the initial temperature, as X-MoE's loss does: training could otherwise raise the
        learned temperature just to lower the loss."""
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
    """Return the module that computes the logits of `moe.router` for rows of a width; its parameters are
    uninitialized."""
    return SCORES[moe.router](width, moe)


def route_counts(expert_NK: Tensor, experts: int, kept_NK: Tensor | None = None) -> Tensor:
    """Return the number of routes per expert, int64: of all routes, or of those that `kept_NK` selects.

    This does not use bincount, which makes the host wait for a GPU.
    """
    weight_NK = torch.ones_like(expert_NK) if kept_NK is None else kept_NK.long()
    zero_E = torch.zeros(experts, dtype=torch.int64, device=expert_NK.device)
    return zero_E.scatter_add_(0, expert_NK.flatten(), weight_NK.flatten())


def balance_loss(probability_NE: Tensor, expert_NK: Tensor) -> Tensor:
    """Return the load-balancing loss E * sum_e mean_n(p_ne) * (share of the choices that are e), before any drop
    (Switch Transformers, arXiv 2101.03961, equation 4).

    With only the first column of `expert_NK` this is the form in both papers' code; with all columns it is MegaBlocks'.
    It is exactly 1 when either factor is uniform, at most E, and its gradient flows only through the probabilities.
    """
    experts = probability_NE.shape[1]
    share_E = route_counts(expert_NK, experts).to(probability_NE.dtype) / expert_NK.numel()
    return experts * (probability_NE.mean(0) * share_E).sum()


def z_loss(logits_NE: Tensor) -> Tensor:
    """Return the router z-loss: the mean over rows of the squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906);
    its minimum is 0."""
    return logits_NE.logsumexp(-1).square().mean()


def moved_bias(bias_E: Tensor, count_E: Tensor, rate: float) -> Tensor:
    """Return the selection bias for the next step (auxiliary-loss-free balancing, arXiv 2408.15664): raised by `rate`
    for experts with fewer routes than the mean, lowered by it for those with more."""
    load_E = count_E.to(bias_E.dtype)
    return bias_E + rate * (load_E.mean() - load_E).sign()


def fits(expert_NK: Tensor, wanted_NK: Tensor, experts: int, limit: int) -> Tensor:
    """Return the mask NK of the wanted routes that fit into the capacity of `limit` rows per expert.

    Slots are assigned in the order of rows, to all first choices before all second ones, and so on. A later row's first
    choice can therefore displace an earlier row's second choice: static routing is not causal.
    """
    order_KN = torch.where(wanted_NK, expert_NK, experts).T.flatten()  # unwanted routes queue for no expert
    sorted_R, route_R = order_KN.sort(stable=True)
    start_E = torch.searchsorted(sorted_R, torch.arange(experts + 1, device=sorted_R.device))
    place_R = torch.empty_like(route_R)
    place_R[route_R] = torch.arange(len(route_R), device=route_R.device) - start_E[sorted_R]
    return wanted_NK & (limit > place_R.view(expert_NK.T.shape).T)


class Routing(NamedTuple):
    """Routing of N rows to their experts."""

    expert_NK: Tensor
    """Chosen experts of each row, int64, first choice first; the experts of a row are all different."""
    gate_NK: Tensor
    """Gates (weights) of the chosen experts, float32; 0 for a route that is dropped."""
    balance_loss: Tensor
    """Load-balancing loss of the layer, scalar; 1 when routing is uniform."""
    z_loss: Tensor
    """Router z-loss of the layer, scalar."""
    count_E: Tensor
    """Number of kept routes per expert, int64."""
    dropped: Tensor
    """Number of routes dropped for lack of capacity, int64 scalar; second choices that `second_expert: random` leaves
    out do not count."""
    places: int | None
    """Expert capacity in rows if routing is static; None if it is dropless."""


class Router(nn.Module):
    """Router: softmax of the logits, then the top k experts."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__()
        self.moe = moe
        self.scores = scores(width, moe)
        if moe.bias_rate:
            self.bias_E: Tensor
            self.register_buffer("bias_E", torch.zeros(moe.experts))

    def forward(self, x_ND: Tensor, generator: torch.Generator | None = None) -> Routing:
        """Return the routing of rows.

        Args:
            x_ND: the rows.
            generator: source of jitter and of P1's random second expert; neither applies without one.
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
        """Choose the top k experts of each row.

        Args:
            logits_NE: logits from `scores`.

        Returns:
            expert_NK and gate_NK as in `Routing`, before any drop, and the probabilities NE.
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
        """Return the mask NK of the routes that are candidates for a slot: all, or without the second choices that
        `second_expert: random` leaves out."""
        wanted_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        if self.moe.second_expert == "random" and generator is not None:
            u_N = torch.rand(len(gate_NK), device=gate_NK.device, dtype=gate_NK.dtype, generator=generator)
            wanted_NK[:, 1] = 2 * gate_NK[:, 1] > u_N
        return wanted_NK
