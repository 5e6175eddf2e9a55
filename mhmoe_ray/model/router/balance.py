"""The load of experts: counts of routes, load balancing losses, the selection bias, and the router z-loss.

The load balancing loss and the bias make the loads of experts equal; the router z-loss keeps logits small. Each belongs
to one layer, and a model sums the losses over its layers. They are computed in float32 or wider.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_ray.spec import MoESpec


class RoutedLogits(NamedTuple):
    """Router logits of rows, float32 or wider, and their chosen experts: the inputs of the load balancing losses."""

    clean_NE: Tensor  # without the router's random noise
    noisy_NE: Tensor  # logits by which experts were chosen
    probability_NE: Tensor  # for the load balancing loss (`BaseScores.balance_probabilities`)
    expert_NK: Tensor  # int64, the best one first

    def slice(self, start: int, stop: int, top_k: int) -> "RoutedLogits":
        """Return the values of rows `start` to `stop` - 1, with only the first `top_k` choices."""
        clean_NE, noisy_NE, probability_NE, expert_NK = (field[start:stop] for field in self)
        return RoutedLogits(clean_NE, noisy_NE, probability_NE, expert_NK[:, :top_k])


def route_counts(expert_NK: Tensor, experts: int, kept_NK: Tensor | None = None) -> Tensor:
    """Return the number of routes, of those in `kept_NK` if it is given, to each expert, int64."""
    # bincount would make the host wait for a GPU.
    weight_NK = torch.ones_like(expert_NK) if kept_NK is None else kept_NK.long()
    zero_E = torch.zeros(experts, dtype=torch.int64, device=expert_NK.device)
    return zero_E.scatter_add_(0, expert_NK.flatten(), weight_NK.flatten())


def balance_loss(moe: MoESpec, routed: RoutedLogits, sequences: int, share_E: Tensor | None) -> Tensor:
    """Return the load balancing loss of one layer; the rows of sequences lie one after another. `share_E` is each
    expert's share of the previous step's choices, for `balance_over: step`."""
    if moe.balance == "importance_load":
        probability_NE, top_k = routed.clean_NE.softmax(-1), routed.expert_NK.shape[1]
        return importance_load_loss(probability_NE, routed.clean_NE, routed.noisy_NE, top_k, moe.noise / moe.experts)
    if share_E is not None:
        return moe.experts * (routed.probability_NE.mean(0) * share_E).sum()
    balanced_NK = routed.expert_NK[:, :1] if moe.balance_choices == "first" else routed.expert_NK
    if moe.balance_over == "sequence":
        return sequence_balance_loss(routed.probability_NE, balanced_NK, sequences)
    return switch_balance_loss(routed.probability_NE, balanced_NK)


def switch_balance_loss(probability_NE: Tensor, expert_NK: Tensor) -> Tensor:
    """Return the load balancing loss E * sum_e mean_n(p_ne) * (share of the choices that are e).

    This is equation 4 of Switch Transformers (arXiv 2101.03961), which counts choices before any route is dropped. With
    only the first column of `expert_NK`, it is the loss in the code of both MH-MoE papers; with all, it is MegaBlocks'.
    It is 1 if either factor is uniform, and at most E. Its gradient flows only through the probabilities.
    """
    experts = probability_NE.shape[1]
    share_E = route_counts(expert_NK, experts).to(probability_NE.dtype) / expert_NK.numel()
    return experts * (probability_NE.mean(0) * share_E).sum()


def sequence_balance_loss(probability_NE: Tensor, expert_NK: Tensor, sequences: int) -> Tensor:
    """Return the mean load balancing loss of sequences (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), whose
    equally many rows lie one after another."""
    experts = probability_NE.shape[1]
    choice_SC = expert_NK.reshape(sequences, -1)
    one_SC = torch.ones_like(choice_SC, dtype=probability_NE.dtype)
    share_SE = one_SC.new_zeros(sequences, experts).scatter_add_(1, choice_SC, one_SC) / choice_SC.shape[1]
    mean_SE = probability_NE.view(sequences, -1, experts).mean(1)
    return experts * (mean_SE * share_SE).sum(1).mean()


def squared_variation(load_E: Tensor) -> Tensor:
    """Return the squared coefficient of variation of the experts' loads."""
    return load_E.var(correction=0) / load_E.mean().square()


def importance_load_loss(
    probability_NE: Tensor, clean_logits_NE: Tensor, noisy_logits_NE: Tensor, top_k: int, noise: float
) -> Tensor:
    """Return V-MoE's load balancing loss: its importance loss plus its load loss (arXiv 2106.05974, appendix A).

    An expert's importance is the sum of its probabilities (without noise) over rows. Its load is the mean probability
    that it would be chosen if only its own noise, of standard deviation `noise`, were drawn again. Each loss is the
    squared coefficient of variation over the experts.
    """
    threshold_N1 = noisy_logits_NE.topk(top_k, dim=-1).values[:, -1:]
    # The probability that a normal variable exceeds z is erfc(z / sqrt 2) / 2.
    chosen_NE = torch.erfc((threshold_N1 - clean_logits_NE) / (noise * math.sqrt(2))) / 2
    return squared_variation(probability_NE.sum(0)) + squared_variation(chosen_NE.mean(0))


def z_loss(logits_NE: Tensor) -> Tensor:
    """Return the router z-loss: the mean squared log-sum-exp of the rows' logits (ST-MoE, arXiv 2202.08906)."""
    return logits_NE.logsumexp(-1).square().mean()


def updated_bias(bias_E: Tensor, count_E: Tensor, rate: float) -> Tensor:
    """Return each expert's selection bias for the next step, which balances loads without a loss (arXiv 2408.15664): it
    rises by `rate` with fewer routes than the mean, and falls with more."""
    load_E = count_E.to(bias_E.dtype)
    return bias_E + rate * (load_E.mean() - load_E).sign()
