"""Kernel `grouped`: it sorts routes by expert, runs each expert once on its contiguous rows, and restores the order.

It runs on any device. The backward is written by hand, and keeps fewer activations than autograd would, or none.

    autograd.py   autograd function of kernels on sorted rows
    pieces.py     division of sorted rows into pieces
    swiglu.py     SwiGLU experts
    gelu.py       GELU experts, with and without SubLN
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mhmoe_kernels.grouped.gelu import GELU
from mhmoe_kernels.grouped.swiglu import SWIGLU
from mhmoe_kernels.permutation import combine, permute, plan_routes
from mhmoe_kernels.weights import ExpertWeights, Gelu, GeluSubln, Swiglu

RunSorted = Callable[[Tensor, Tensor, ExpertWeights], Tensor]
"""Function (x_RD, count_E, weights) -> y_RD, like `run_sorted`."""


def sort_and_run(
    run_sorted: RunSorted, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Run `mhmoe_kernels.run_experts` by sorting routes, `run_sorted`, and combining outputs."""
    # `.cpu()` makes the host wait for a GPU, but the loop over experts needs the counts on the host.
    plan = plan_routes(expert_NK, len(weights.stacked[0]))
    return combine(run_sorted(permute(x_ND, plan), plan.count_E.cpu(), weights), gate_NK, plan)


def run_grouped(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts, as `mhmoe_kernels.run_experts` does."""
    return sort_and_run(run_sorted, x_ND, expert_NK, gate_NK, weights)


def run_sorted(x_RD: Tensor, count_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through their experts; `count_E` is int64 in CPU memory."""
    # If gradients are disabled, there is no backward. So the share of rows to recompute is 1.0, and no hidden rows are
    # kept.
    recompute = weights.recompute if torch.is_grad_enabled() else 1.0
    if isinstance(weights.function, Swiglu):
        return SWIGLU(x_RD, count_E, (recompute,), weights.stacked)
    assert isinstance(weights.function, GeluSubln | Gelu)
    eps = weights.function.eps if isinstance(weights.function, GeluSubln) else 0.0
    return GELU(x_RD, count_E, (eps, recompute), weights.stacked)
