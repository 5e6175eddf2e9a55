"""Sort routes by expert, run each expert once on its contiguous rows, un-sort."""

from collections.abc import Callable

from torch import Tensor

from mhmoe_kernels.permute import combine, permute, plan_routes
from mhmoe_kernels.sorted_gelu import gelu_sorted
from mhmoe_kernels.sorted_swiglu import swiglu_sorted
from mhmoe_kernels.weights import ExpertWeights, Swiglu

RunSorted = Callable[[Tensor, list[int], ExpertWeights], Tensor]
"""Rows sorted by expert, rows per expert, and the experts, to one row for each."""


def sort_first(
    run_sorted: RunSorted, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights
) -> Tensor:
    """As `mhmoe_kernels.run_experts`, by what runs sorted rows through their experts."""
    # `tolist` makes the host wait for a GPU; the loop over experts needs numbers.
    plan = plan_routes(expert_NK, len(weights.stacked[0]))
    return combine(run_sorted(permute(x_ND, plan), plan.count_E.tolist(), weights), gate_NK, plan)


def grouped(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """See `mhmoe_kernels.run_experts`."""
    return sort_first(run_sorted, x_ND, expert_NK, gate_NK, weights)


def run_sorted(x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """Rows sorted by expert through their experts.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: rows per expert, adding up to R.
        weights: len(counts) experts.
    """
    if isinstance(weights.function, Swiglu):
        gate_EFD, up_EFD, down_EDF = weights.stacked
        return swiglu_sorted(x_RD, counts, gate_EFD, up_EFD, down_EDF, weights.recompute)
    return gelu_sorted(x_RD, counts, weights.stacked, weights.function.eps, weights.recompute)
