"""The router: logits over E experts per row, top-k routing, expert capacity, load balancing loss and router z-loss.

Logits are W x (P1, equation 5; P2, section 2.1), X-MoE's as published, or X-MoE's as torchscale computes them, which P1
used. With an expert capacity, an expert takes a limited number of rows, and the routes beyond it are dropped. The load
balancing loss and a selection bias make the load of experts equal; the router z-loss keeps logits small. Each of them
belongs to one layer, and a model sums the losses over its layers.

Everything here is computed in float32 or wider.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import can_fuse_routing, fused_routing, widen
from mhmoe_ray.spec import MoESpec
from mhmoe_ray.spec.moe import RouterName


class BaseScores(nn.Module, ABC):
    """Module that computes a router's logits; the base class of all kinds."""

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
        """Return the logits NE of rows, in float32 or wider."""

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """Return the probabilities NE for the load balancing loss; by default those of the routing itself."""
        return probability_NE


class LinearScores(BaseScores):
    """Logits W x of router `linear`."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.weight_ED = nn.Parameter(torch.empty(moe.experts, width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ widen(self.weight_ED).T


# X-MoE's initial temperature (arXiv 2204.09179).
INITIAL_TEMPERATURE = 0.3
# Tutel's bound. At a temperature of 0 scores would be infinite, and below 0 their order would be reversed.
MIN_TEMPERATURE = 0.01


class XMoEScores(BaseScores):
    """Logits of router `xmoe`, as published: the cosines of projected rows with expert embeddings, divided by a
    learnable temperature."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))
        # The logarithm is the parameter, because the temperature itself could reach 0 within 500 steps of Adam at a
        # learning rate of 6e-4. It is a vector of one element, because neither FSDP2 nor DeepSpeed accepts scalars.
        self.log_temperature = nn.Parameter(torch.empty(1))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.cosine(x_ND) / self.temperature

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """Return the probabilities NE at the initial temperature instead of the learned one, as X-MoE's load balancing
        loss uses them."""
        # At the learned temperature, training could lower the loss just by raising the temperature.
        return (self.cosine(x_ND) / INITIAL_TEMPERATURE).softmax(-1)

    @property
    def temperature(self) -> Tensor:
        return MIN_TEMPERATURE + widen(self.log_temperature).exp()

    def cosine(self, x_ND: Tensor) -> Tensor:
        """Return the cosines NE of projected rows with expert embeddings."""
        return F.normalize(x_ND @ widen(self.reduce_QD).T, dim=-1) @ F.normalize(widen(self.expert_EQ), dim=-1).T


class TorchscaleScores(BaseScores):
    """Logits of router `xmoe_torchscale`, which are X-MoE's as P1's code computes them: only the expert embeddings are
    normalized, and there is no temperature."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ widen(self.reduce_QD).T @ F.normalize(widen(self.expert_EQ), dim=-1, eps=1e-4).T


SCORES_BY_ROUTER: dict[RouterName, type[BaseScores]] = {
    "linear": LinearScores,
    "xmoe": XMoEScores,
    "xmoe_torchscale": TorchscaleScores,
}


def build_scores(width: int, moe: MoESpec) -> BaseScores:
    """Return the module that computes the logits of router `moe.router` for rows of width `width`. Its parameters are
    uninitialized."""
    return SCORES_BY_ROUTER[moe.router](width, moe)


class Scores(Protocol):
    """Function that computes the logits of rows, and what the load balancing loss needs of them (`BaseScores`)."""

    def __call__(self, x_ND: Tensor) -> Tensor: ...

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor: ...


def route_counts(expert_NK: Tensor, experts: int, kept_NK: Tensor | None = None) -> Tensor:
    """Return the number of routes to each of `experts` experts, int64. With the mask `kept_NK`, only the routes that it
    selects count."""
    # bincount would make the host wait for a GPU.
    weight_NK = torch.ones_like(expert_NK) if kept_NK is None else kept_NK.long()
    zero_E = torch.zeros(experts, dtype=torch.int64, device=expert_NK.device)
    return zero_E.scatter_add_(0, expert_NK.flatten(), weight_NK.flatten())


def balance_loss(probability_NE: Tensor, expert_NK: Tensor) -> Tensor:
    """Return the load balancing loss E * sum_e mean_n(p_ne) * (share of the choices that are e), before any drop
    (Switch Transformers, arXiv 2101.03961, equation 4).

    With only the first column of `expert_NK` it has the form of both papers' code; with all columns, MegaBlocks'. It is
    exactly 1 if either factor is uniform, and at most E. Its gradient flows only through the probabilities.
    """
    experts = probability_NE.shape[1]
    share_E = route_counts(expert_NK, experts).to(probability_NE.dtype) / expert_NK.numel()
    return experts * (probability_NE.mean(0) * share_E).sum()


def sequence_balance_loss(probability_NE: Tensor, expert_NK: Tensor, sequences: int) -> Tensor:
    """Return the mean over sequences of the load balancing loss of each sequence (DeepSeek-V3, arXiv 2412.19437,
    equations 17 to 20).

    Args:
        probability_NE: probabilities of rows; the rows of a sequence lie one after another.
        expert_NK: choices that count.
        sequences: number of sequences, which have equally many rows.
    """
    experts = probability_NE.shape[1]
    choice_SC = expert_NK.reshape(sequences, -1)
    one_SC = torch.ones_like(choice_SC, dtype=probability_NE.dtype)
    share_SE = one_SC.new_zeros(sequences, experts).scatter_add_(1, choice_SC, one_SC) / choice_SC.shape[1]
    mean_SE = probability_NE.view(sequences, -1, experts).mean(1)
    return experts * (mean_SE * share_SE).sum(1).mean()


def squared_variation(load_E: Tensor) -> Tensor:
    """Return the square of the coefficient of variation of the experts' loads: 0 if all are equal."""
    return load_E.var(correction=0) / load_E.mean().square()


def importance_load_loss(
    probability_NE: Tensor, clean_logits_NE: Tensor, noisy_logits_NE: Tensor, top_k: int, noise: float
) -> Tensor:
    """Return the importance loss plus the load loss of V-MoE (arXiv 2106.05974, appendix A).

    The importance of an expert is the sum of its probabilities over all rows. Its load is the mean probability that it
    would be chosen, if only its own noise were drawn again. Each loss is the squared coefficient of variation.

    Args:
        probability_NE: probabilities of rows without noise.
        clean_logits_NE: logits of rows without noise.
        noisy_logits_NE: logits by which experts were chosen.
        top_k: number of experts that a row chooses.
        noise: standard deviation of the noise.
    """
    threshold_N1 = noisy_logits_NE.topk(top_k, dim=-1).values[:, -1:]
    # The probability that a normal variable exceeds z is erfc(z / sqrt 2) / 2.
    chosen_NE = torch.erfc((threshold_N1 - clean_logits_NE) / (noise * math.sqrt(2))) / 2
    return squared_variation(probability_NE.sum(0)) + squared_variation(chosen_NE.mean(0))


def z_loss(logits_NE: Tensor) -> Tensor:
    """Return the router z-loss: the mean over rows of the squared log-sum-exp of the logits (ST-MoE, arXiv
    2202.08906)."""
    return logits_NE.logsumexp(-1).square().mean()


def updated_bias(bias_E: Tensor, count_E: Tensor, rate: float) -> Tensor:
    """Return the selection bias for the next step: raised by `rate` for experts with fewer routes than the mean, and
    lowered by `rate` for experts with more (auxiliary-loss-free balancing, arXiv 2408.15664)."""
    load_E = count_E.to(bias_E.dtype)
    return bias_E + rate * (load_E.mean() - load_E).sign()


def capacity_mask(expert_NK: Tensor, candidate_NK: Tensor, experts: int, capacity: int) -> Tensor:
    """Return the mask NK of the candidate routes that fit into an expert capacity of `capacity` rows. The other
    candidates must be dropped.

    Slots are assigned to all first choices before all second choices, and so on, each in the order of rows. A later
    row's first choice can therefore displace an earlier row's second choice: static routing is not causal.
    """
    # Routes that are no candidates queue for an expert that does not exist. A stable sort keeps the order of a queue.
    queue_KN = torch.where(candidate_NK, expert_NK, experts).T.flatten()
    sorted_R, route_R = queue_KN.sort(stable=True)
    start_E = torch.searchsorted(sorted_R, torch.arange(experts + 1, device=sorted_R.device))
    position_R = torch.empty_like(route_R)
    position_R[route_R] = torch.arange(len(route_R), device=route_R.device) - start_E[sorted_R]
    return candidate_NK & (capacity > position_R.view(expert_NK.T.shape).T)


def mask_groups(preference_NE: Tensor, groups: int, top_groups: int) -> Tensor:
    """Return the preferences with -inf for the experts outside the `top_groups` best groups of each row.

    The value of a group is the sum of its two largest preferences (group-limited routing, DeepSeek-V3, arXiv
    2412.19437).
    """
    preference_NGE = preference_NE.view(len(preference_NE), groups, -1)
    value_NG = preference_NGE.topk(min(2, preference_NGE.shape[-1]), dim=-1).values.sum(-1)
    is_kept_NG = torch.zeros_like(value_NG, dtype=torch.bool).scatter_(
        1, value_NG.topk(top_groups, dim=-1).indices, True
    )
    masked_NGE: Tensor = preference_NGE.masked_fill(~is_kept_NG[..., None], float("-inf"))
    return masked_NGE.flatten(1)


class Routing(NamedTuple):
    """Routing of N rows to their experts."""

    expert_NK: Tensor
    """Chosen experts of each row, int64, in the order of preference. The experts of a row are all different."""
    gate_NK: Tensor
    """Gates (weights) of the chosen experts, float32; 0 for a route that is dropped."""
    balance_loss: Tensor
    """Load balancing loss of the layer, scalar; 1 if routing is uniform."""
    z_loss: Tensor
    """Router z-loss of the layer, scalar."""
    count_E: Tensor
    """Number of kept routes per expert, int64."""
    dropped_routes: Tensor
    """Number of routes that exceed the expert capacity and are dropped, int64 scalar. Second choices that
    `second_expert: random` leaves out do not count."""
    capacity: int | None
    """Expert capacity in rows if routing is static; None if it is dropless."""


class TopK(NamedTuple):
    """Numbers of experts that rows choose."""

    largest: int
    """Largest number of a row: K, the number of columns of a routing."""
    count_N: Tensor | None = None
    """Number of each row, int64; None if all rows have the same."""


class RoutedLogits(NamedTuple):
    """Logits of rows, and the choice by them, as the load balancing loss needs them."""

    x_ND: Tensor
    """Rows in float32 or wider."""
    clean_NE: Tensor
    """Logits without noise."""
    noisy_NE: Tensor
    """Logits by which experts were chosen; those without noise if there is none."""
    probability_NE: Tensor
    """Probabilities of the logits by which experts were chosen."""
    expert_NK: Tensor
    """Chosen experts."""

    def slice(self, start: int, stop: int, top_k: int) -> "RoutedLogits":
        """Return the logits of rows `start` to `stop` - 1, with the first `top_k` choices."""
        x_ND, clean_NE, noisy_NE, probability_NE, expert_NK = (field[start:stop] for field in self)
        return RoutedLogits(x_ND, clean_NE, noisy_NE, probability_NE, expert_NK[:, :top_k])


def _chosen_mask(top_k: TopK, count_N: Tensor) -> Tensor:
    """Return the mask NK of the routes that each row chooses: the first `count_N` of its K."""
    return torch.arange(top_k.largest, device=count_N.device) < count_N[:, None]


class Router(nn.Module):
    """Router of one layer: softmax of the logits, then the top k experts."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__()
        self.moe = moe
        self._build_scores(width)
        if moe.bias_rate:
            self.bias_E: Tensor
            self.register_buffer("bias_E", torch.zeros(moe.experts))
        if moe.balance_over == "step":
            # Only training needs it, so it is no weight of the model (`Decoder.training_buffers`).
            self.share_E: Tensor
            self.register_buffer("share_E", torch.zeros(moe.experts), persistent=False)
            """Share of each expert in the choices of the step before; zero in the first step."""

    def _build_scores(self, width: int) -> None:
        """Create the modules that compute logits for rows of width `width`."""
        self.scores = build_scores(width, self.moe)

    def _scores_of(self, group_rows: Sequence[int]) -> Scores:
        """Return the function that computes the logits of rows in groups of these sizes."""
        return self.scores

    def _top_k_of(self, group_rows: Sequence[int], device: torch.device) -> TopK:
        """Return how many experts rows in groups of these sizes choose."""
        return TopK(self.moe.top_k)

    def _capacity(self, group_rows: Sequence[int], rows: int) -> int | None:
        """Return the expert capacity for rows in groups of these sizes."""
        return self.moe.expert_capacity(rows)

    def forward(
        self,
        x_ND: Tensor,
        generator: torch.Generator | None = None,
        sequences: int = 1,
        domain_B: Tensor | None = None,
        group_rows: Sequence[int] = (),
    ) -> Routing:
        """Return the routing of rows. The expert capacity applies only in training mode (`Module.train`).

        Args:
            x_ND: the rows.
            generator: generator of jitter, noise and P1's random second expert; none of them applies without one.
            sequences: number of sequences, whose rows lie one after another.
            domain_B: not used; `DomainRouter` needs it.
            group_rows: number of rows of each group, for routers by modality or by task; groups lie one after another.
        """
        # Autocast would compute logits in bfloat16.
        with torch.autocast(x_ND.device.type, enabled=False):
            return self._route(widen(x_ND), generator, sequences, group_rows)

    def _route(
        self, x_ND: Tensor, generator: torch.Generator | None, sequences: int = 1, group_rows: Sequence[int] = ()
    ) -> Routing:
        """Return the routing of rows in float32 or wider. Autocast must be off."""
        moe, rows, scores = self.moe, len(x_ND), self._scores_of(group_rows)
        top_k = self._top_k_of(group_rows, x_ND.device)
        if moe.jitter and generator is not None:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - moe.jitter, 1 + moe.jitter, generator=generator)
        clean_NE = logits_NE = scores(x_ND)
        if moe.noise and generator is not None:
            noise_NE = torch.empty_like(logits_NE).normal_(std=moe.noise / moe.experts, generator=generator)
            logits_NE = logits_NE + noise_NE
        capacity = self._capacity(group_rows, rows) if self.training else None
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
        routed = RoutedLogits(x_ND, clean_NE, logits_NE, balance_NE, expert_NK)
        return Routing(
            expert_NK,
            gate_NK * kept_NK,
            # The load balancing loss and the router z-loss of no rows would be NaN. The sum is 0 and has a gradient.
            self._balance_loss(routed, sequences, group_rows) if rows else logits_NE.sum(),
            z_loss(logits_NE) if rows else logits_NE.sum(),
            count_E,
            candidate_NK.sum() - count_E.sum(),
            capacity,
        )

    def _is_plain(self, generator: torch.Generator | None) -> bool:
        """Return whether routing is a softmax, the k largest scores, and losses over a micro-batch, with nothing
        added to them."""
        moe = self.moe
        has_random_choice = moe.second_expert == "random" and generator is not None
        # X-MoE's load balancing loss uses other probabilities than routing.
        has_own_probabilities = (
            SCORES_BY_ROUTER[moe.router].balance_probabilities is not BaseScores.balance_probabilities
        )
        return not (
            moe.scoring != "softmax"
            or moe.bias_rate
            or moe.groups > 1
            or moe.balance_over != "micro_batch"
            or moe.balance != "shares"
            or has_random_choice
            or has_own_probabilities
        )

    def _balance_loss(self, routed: RoutedLogits, sequences: int, group_rows: Sequence[int]) -> Tensor:
        """Return the load balancing loss of the rows, over the choices that the spec counts."""
        moe, probability_NE = self.moe, routed.probability_NE
        if moe.balance == "importance_load":
            top_k = routed.expert_NK.shape[1]
            probability_NE = routed.clean_NE.softmax(-1)
            noise = moe.noise / moe.experts
            return importance_load_loss(probability_NE, routed.clean_NE, routed.noisy_NE, top_k, noise)
        if moe.balance_over == "step":
            return moe.experts * (probability_NE.mean(0) * self.share_E).sum()
        balanced_NK = routed.expert_NK[:, :1] if moe.balance_choices == "first" else routed.expert_NK
        if moe.balance_over == "sequence":
            return sequence_balance_loss(probability_NE, balanced_NK, sequences)
        return balance_loss(probability_NE, balanced_NK)

    def choose_experts(self, logits_NE: Tensor, top_k: TopK | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the top k experts of each row.

        Args:
            logits_NE: logits of the rows.
            top_k: numbers of experts; by default that of the spec for all rows.

        Returns:
            expert_NK and gate_NK as in `Routing`, before any drop, and the probabilities NE: the scores of each row,
            which add up to 1. A row has K different experts; if it chooses fewer, the gates of the rest are 0.
        """
        top_k = top_k or TopK(self.moe.top_k)
        moe = self.moe
        is_softmax = moe.scoring == "softmax"
        score_NE = logits_NE.softmax(-1) if is_softmax else logits_NE.sigmoid()
        # The bias affects only the choice; gates come from the scores themselves.
        preference_NE = score_NE + self.bias_E if moe.bias_rate else score_NE
        if moe.groups > 1:
            # The choice has no gradient, so nothing need be kept for one.
            preference_NE = mask_groups(preference_NE.detach(), moe.groups, moe.top_groups)
        expert_NK = preference_NE.topk(top_k.largest, dim=-1).indices
        gate_NK = score_NE.gather(-1, expert_NK)
        chosen_NK = None if top_k.count_N is None else _chosen_mask(top_k, top_k.count_N)
        if chosen_NK is not None:
            gate_NK = gate_NK * chosen_NK
        if moe.normalize_gates and is_softmax:
            # This equals dividing the chosen probabilities by their sum. That sum is 0 if a bias chose experts whose
            # probabilities have all underflowed.
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
        """Return the mask NK of the routes that compete for the slots of experts: all but the second choices that
        `second_expert: random` leaves out."""
        candidate_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        if self.moe.second_expert == "random" and generator is not None:
            u_N = torch.rand(len(gate_NK), device=gate_NK.device, dtype=gate_NK.dtype, generator=generator)
            candidate_NK[:, 1] = 2 * gate_NK[:, 1] > u_N
        return candidate_NK
