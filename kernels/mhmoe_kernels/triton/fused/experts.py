"""Autograd function of the fused experts, from routed rows to combined outputs.

For the backward it keeps only x, routes, gates and weights, and for GELU experts two numbers per route (mean and
inverse deviation of the norm) and two vectors per expert (`norm_terms`). The backward recomputes the hidden layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.triton.fused.operators import fused_backward_rows, fused_backward_weights, fused_forward, norm_terms
from mhmoe_kernels.triton.operators import SortedRoutes, combine_rows, sorted_routes, split
from mhmoe_kernels.weights import ExpertWeights, GeluSubln

_SORT_ROWS_PER_TILE = 128
"""Rows of a tile in the sort of routes; the fused kernels have their own tiles."""


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: str, eps: float, expert_NK: Tensor | SortedRoutes, x_ND: Tensor, gate_NK: Tensor,
        *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        x_ND, gate_NK, weights = x_ND.contiguous(), gate_NK.contiguous(), tuple(w.contiguous() for w in weights)
        top_k = gate_NK.shape[1]
        routes = sorted_routes(expert_NK, len(weights[0]), _SORT_ROWS_PER_TILE)
        terms = norm_terms(kind, weights)
        out_RD, statistics = fused_forward(kind, eps, x_ND, weights, terms, routes.route_R, routes.offset_E1, top_k)
        ctx.kind, ctx.counts = kind, (len(weights), len(terms))
        ctx.save_for_backward(*routes[:3], x_ND, gate_NK, *weights, *terms, *statistics)
        y_ND: Tensor = combine_rows(out_RD, None, routes.slot_NK, gate_NK)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        route_R, slot_NK, offset_E1, x_ND, gate_NK, *saved = ctx.saved_tensors
        weights, terms, statistics = split(saved, *ctx.counts)
        dy_ND, routes = dy_ND.contiguous(), (route_R, offset_E1, gate_NK.shape[1])
        # The kernel for gradients of weights reads results of the kernel for gradients of rows. So the latter runs even
        # if no gradient of rows is needed.
        dx_RD, dgate_S, row_statistics = fused_backward_rows(
            ctx.kind, x_ND, dy_ND, gate_NK, weights, terms, statistics, *routes
        )
        dx_ND = combine_rows(dx_RD, None, slot_NK, None) if ctx.needs_input_grad[3] else None
        dweights: list[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[5:]):
            dweights = fused_backward_weights(
                ctx.kind, x_ND, dy_ND, gate_NK, weights, [*statistics, *row_statistics], *routes
            )
        return None, None, None, dx_ND, dgate_S.view_as(gate_NK).to(gate_NK.dtype), *dweights


_fused_experts: Callable[..., Tensor] = _FusedExperts.apply


def run(x_ND: Tensor, expert_NK: Tensor | SortedRoutes, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through fused experts, as `mhmoe_kernels.run_experts` does."""
    function = weights.function
    kind, eps = ("gelu", function.eps) if isinstance(function, GeluSubln) else ("swiglu", 0.0)
    return _fused_experts(kind, eps, expert_NK, x_ND, gate_NK, *weights.stacked)
