"""What keeps experts equally loaded: two losses and a bias. Each is of one layer; a model sums them over its layers."""

import torch
from torch import Tensor


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
