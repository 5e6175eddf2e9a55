"""Kernel `adapted`: experts with frozen weights, and low-rank adapters of some of them.

It runs each expert once on its contiguous rows. Autograd differentiates it, and skips the gradients of frozen weights,
which would be the larger part of the backward.
"""

import torch
from torch import Tensor

from mhmoe_kernels.grouped import sort_and_run
from mhmoe_kernels.weights import ExpertWeights


def run_sorted(x_RD: Tensor, count_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through their experts; `count_E` is int64 in CPU memory."""
    # The gradient of `unbind` is one stack. Indexing would give each expert a gradient as large as the stack.
    experts = zip(*(w.unbind() for w in weights.stacked), strict=True)
    # An expert without rows runs too, so that its adapter has a gradient.
    parts = zip(torch.split(x_RD, count_E.tolist()), experts, strict=True)
    return torch.cat([weights.function(x, *expert) for x, expert in parts])


def run_adapted(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts, as `mhmoe_kernels.run_experts` does."""
    return sort_and_run(run_sorted, x_ND, expert_NK, gate_NK, weights)
