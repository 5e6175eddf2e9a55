"""The top-k router of one layer: the choice of experts by their logits, gates, and expert capacity.

With an expert capacity, an expert takes a limited number of rows, and the routes beyond it are dropped. Everything here
is computed in float32 or wider.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_kernels import can_fuse_logits, can_fuse_routing, fused_logits, fused_routing, widen
from mhmoe_ray.model.router.balance import RoutedLogits, balance_loss, route_counts, z_loss
from mhmoe_ray.model.router.base import NO_CONTEXT, BaseRouter, Routing, RoutingContext, Scores
from mhmoe_ray.model.router.scores import LinearScores
from mhmoe_ray.model.router.table import build_scores
from mhmoe_ray.spec import MoESpec


def capacity_mask(expert_NK: Tensor, candidate_NK: Tensor, experts: int, capacity: int) -> Tensor:
    """Return the mask NK of the candidate routes that experts can take, `capacity` rows each.

    Slots go to all first choices before all second choices, and so on, each in the order of rows. A later row's first
    choice can therefore displace an earlier row's second choice: static routing is not causal.
    """
    # Routes that are not candidates for a slot queue for an extra expert, which does not exist. A stable sort keeps the
    # order within the queue of each expert.
    queue_KN = torch.where(candidate_NK, expert_NK, experts).T.flatten()
    sorted_R, route_R = queue_KN.sort(stable=True)
    start_E = torch.searchsorted(sorted_R, torch.arange(experts + 1, device=sorted_R.device))
    position_R = torch.empty_like(route_R)
    position_R[route_R] = torch.arange(len(route_R), device=route_R.device) - start_E[sorted_R]
    return candidate_NK & (capacity > position_R.view(expert_NK.T.shape).T)


def mask_groups(preference_NE: Tensor, groups: int, top_groups: int) -> Tensor:
    """Return the preferences, with -inf outside the `top_groups` best groups of each row. The value of a group is the
    sum of its two largest preferences (group-limited routing, DeepSeek-V3, arXiv 2412.19437)."""
    preference_NGE = preference_NE.view(len(preference_NE), groups, -1)
    value_NG = preference_NGE.topk(min(2, preference_NGE.shape[-1]), dim=-1).values.sum(-1)
    is_kept_NG = torch.zeros_like(value_NG, dtype=torch.bool).scatter_(
        1, value_NG.topk(top_groups, dim=-1).indices, True
    )
    masked_NGE: Tensor = preference_NGE.masked_fill(~is_kept_NG[..., None], float("-inf"))
    return masked_NGE.flatten(1)


class TopK(NamedTuple):
    """Number of experts that each row chooses."""

    largest: int  # K: the largest number of any row, and of columns of a `Routing`
    count_N: Tensor | None = None  # int64; None if all rows choose K experts


def _chosen_mask(top_k: TopK, count_N: Tensor) -> Tensor:
    return torch.arange(top_k.largest, device=count_N.device) < count_N[:, None]


class Router(BaseRouter):
    """Router of one layer, which chooses the top k experts of each row."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(moe)
        self._build_scores(width)
        if moe.bias_rate:
            self.bias_E: Tensor
            self.register_buffer("bias_E", torch.zeros(moe.experts))
        if moe.balance_over == "step":
            # Only training needs this buffer, so it is not a weight of the model (`Trunk.training_buffers`).
            self.share_E: Tensor
            self.register_buffer("share_E", torch.zeros(moe.experts), persistent=False)
            """Share of each expert in the choices of the step before; zero in the first step."""

    def _build_scores(self, width: int) -> None:
        self.scores = build_scores(width, self.moe)

    def _scores_of(self, group_rows: Sequence[int]) -> Scores:
        return self.scores

    def _top_k_of(self, group_rows: Sequence[int], device: torch.device) -> TopK:
        return TopK(self.moe.top_k)

    def _capacity(self, group_rows: Sequence[int], rows: int) -> int | None:
        """Return the expert capacity in rows; None if there is no limit."""
        return self.moe.expert_capacity(rows)

    def forward(
        self, x_ND: Tensor, generator: torch.Generator | None = None, context: RoutingContext = NO_CONTEXT
    ) -> Routing:
        """Choose the experts of rows. The expert capacity applies only in training mode (`Module.train`)."""
        # Autocast would compute logits in bfloat16, in which many different logits become equal.
        with torch.autocast(x_ND.device.type, enabled=False):
            return self._route(x_ND, generator, context)

    def _route(self, x_ND: Tensor, generator: torch.Generator | None, context: RoutingContext = NO_CONTEXT) -> Routing:
        """Choose the experts of rows as `forward` does. Autocast must be off."""
        moe, rows, scores = self.moe, len(x_ND), self._scores_of(context.group_rows)
        top_k = self._top_k_of(context.group_rows, x_ND.device)
        has_jitter = moe.jitter > 0 and generator is not None
        if isinstance(scores, LinearScores) and not has_jitter and can_fuse_logits(moe.kernel, x_ND):
            clean_NE = fused_logits(x_ND, scores.weight_ED)
        else:
            x_ND = widen(x_ND)
            if has_jitter:
                x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - moe.jitter, 1 + moe.jitter, generator=generator)
            clean_NE = scores(x_ND)
        logits_NE = clean_NE
        if moe.noise and generator is not None:
            noise_NE = torch.empty_like(logits_NE).normal_(std=moe.noise / moe.experts, generator=generator)
            logits_NE = logits_NE + noise_NE
        capacity = self._capacity(context.group_rows, rows) if self.training else None
        if top_k.count_N is None and self._is_plain(generator) and can_fuse_routing(moe.kernel, logits_NE):
            fused = fused_routing(
                logits_NE,
                top_k.largest,
                capacity,
                normalized=moe.normalize_gates,
                scale=moe.gate_scale,
                counts_first=moe.balance_choices == "first",
            )
            return Routing(*fused, capacity)
        expert_NK, gate_NK, probability_NE = self.choose_experts(logits_NE, top_k)
        candidate_NK = self._candidate_routes(expert_NK, gate_NK, generator)
        if top_k.count_N is not None:
            candidate_NK &= _chosen_mask(top_k, top_k.count_N)
        kept_NK = candidate_NK if capacity is None else capacity_mask(expert_NK, candidate_NK, moe.experts, capacity)
        count_E = route_counts(expert_NK, moe.experts, kept_NK)
        balance_NE = scores.balance_probabilities(x_ND, probability_NE)
        routed = RoutedLogits(clean_NE, logits_NE, balance_NE, expert_NK)
        return Routing(
            expert_NK,
            gate_NK * kept_NK,
            # Without rows, the load balancing loss and the router z-loss would be NaN. The sum of no logits is 0 and
            # has a gradient.
            self._balance_loss(routed, context) if rows else logits_NE.sum(),
            z_loss(logits_NE) if rows else logits_NE.sum(),
            count_E,
            candidate_NK.sum() - count_E.sum(),
            capacity,
        )

    def _is_plain(self, generator: torch.Generator | None) -> bool:
        """Return whether the kernel `fused_routing` can compute the routing, after jitter and noise."""
        has_random_choice = self.moe.second_expert == "random" and generator is not None
        return self.moe.has_plain_routing and not has_random_choice

    def _balance_loss(self, routed: RoutedLogits, context: RoutingContext) -> Tensor:
        share_E = self.share_E if self.moe.balance_over == "step" else None
        return balance_loss(self.moe, routed, context.sequences, share_E)

    def preferences(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of experts, and the preferences by which a row chooses the first of them."""
        moe = self.moe
        score_NE = logits_NE.softmax(-1) if moe.scoring == "softmax" else logits_NE.sigmoid()
        # The bias affects only the choice; gates come from the scores themselves.
        preference_NE = score_NE + self.bias_E if moe.bias_rate else score_NE
        if moe.groups > 1:
            # The choice has no gradient, so autograd need not record it.
            preference_NE = mask_groups(preference_NE.detach(), moe.groups, moe.top_groups)
        return score_NE, preference_NE

    def choose_experts(self, logits_NE: Tensor, top_k: TopK | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return `expert_NK` and `gate_NK` before routes are dropped, and the probabilities NE, scores scaled to a sum
        of 1. A row has K different experts; if it chooses fewer, other gates are 0."""
        top_k = top_k or TopK(self.moe.top_k)
        moe = self.moe
        is_softmax = moe.scoring == "softmax"
        score_NE, preference_NE = self.preferences(logits_NE)
        expert_NK = preference_NE.topk(top_k.largest, dim=-1).indices
        gate_NK = score_NE.gather(-1, expert_NK)
        chosen_NK = None if top_k.count_N is None else _chosen_mask(top_k, top_k.count_N)
        if chosen_NK is not None:
            gate_NK = gate_NK * chosen_NK
        if moe.normalize_gates and is_softmax:
            # A softmax of the chosen logits equals the chosen probabilities divided by their sum. It also works if that
            # sum is 0, because a bias chose experts whose probabilities have all underflowed.
            chosen_logits_NK = logits_NE.gather(-1, expert_NK)
            if chosen_NK is not None:
                chosen_logits_NK = chosen_logits_NK.masked_fill(~chosen_NK, float("-inf"))
            gate_NK = chosen_logits_NK.softmax(-1)
        elif moe.normalize_gates:
            # DeepSeek-V3's code adds the same constant, so that the sum cannot be 0.
            gate_NK = gate_NK / (gate_NK.sum(-1, keepdim=True) + 1e-20)
        if moe.gate_scale != 1:
            gate_NK = gate_NK * moe.gate_scale
        return expert_NK, gate_NK, score_NE if is_softmax else score_NE / score_NE.sum(-1, keepdim=True)

    def _candidate_routes(self, expert_NK: Tensor, gate_NK: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the mask NK without routes that `second_expert: random` leaves out."""
        candidate_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        if self.moe.second_expert == "random" and generator is not None:
            u_N = torch.rand(len(gate_NK), device=gate_NK.device, dtype=gate_NK.dtype, generator=generator)
            candidate_NK[:, 1] = 2 * gate_NK[:, 1] > u_N
        return candidate_NK
