"""Experts as grouped matrix products with small kernels between them, forward and backward, on rows sorted by expert.

The hand-written backward needs the rows and, for SwiGLU, gate and up, or for GELU its input and two numbers per row.
Outputs of experts are not kept: the gradient of a gate is a product of hidden values with their gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.triton.grouped import operators as ops
from mhmoe_kernels.triton.grouped.blocks import rows_per_tile
from mhmoe_kernels.triton.grouped.products import Parts, Products, Tiles
from mhmoe_kernels.triton.operators import SortedRoutes, Tensors, combine_rows, gather_rows, sorted_routes, split
from mhmoe_kernels.weights import ExpertWeights, Function, GeluSubln


class Scales(NamedTuple):
    """Scale (gate) of each route, in the order of routes, and the route of each slot."""

    scale_S: Tensor
    route_R: Tensor


class SwigluSteps:
    """Forward and backward of SwiGLU experts on sorted rows; `project` computes gate and up."""

    def project(self, x_RD: Tensor, weights: Tensors, products: Products, known_rows: Tensors = ()) -> Tensors:
        """Return the hidden values before the activation; the forward may have kept their first rows, `known_rows`."""
        known_parts = known_rows or (None, None)
        return tuple(products.linear(x_RD, w, known_PO=part) for w, part in zip(weights[:2], known_parts, strict=True))

    def finish(self, hidden: Tensors, weights: Tensors, products: Products) -> tuple[Tensor, Tensors]:
        """Return each row's expert output, and row statistics for the backward, of which SwiGLU has none."""
        return products.linear(ops.swiglu_forward(*hidden), weights[2]), ()

    def backward(
        self, dout_RD: Tensor, x_RD: Tensor, hidden: Tensors, statistics: Tensors, weights: Tensors, products: Products,
        scales: Scales,
    ) -> tuple[Parts, Tensor, Tensors]:  # fmt: skip
        """Return the gradients of the rows (as a sum of one or two tensors), of the scales, and of the weights.

        `dout_RD` is the gradient of the scaled outputs, `hidden` the results of `project`, `statistics` those of
        `finish`.
        """
        gate_EFD, up_EFD, down_EDF = weights
        dhidden_RF = products.backward(dout_RD, down_EDF)
        dgate_RF, dup_RF, hidden_RF, dscale_S = ops.swiglu_backward(*hidden, dhidden_RF, *scales)
        del dhidden_RF
        ddown = products.outer(dout_RD, hidden_RF)
        del hidden_RF
        dgate, dup = (products.outer(d_RF, x_RD) for d_RF in (dgate_RF, dup_RF))
        return products.backward_sum(dgate_RF, gate_EFD, dup_RF, up_EFD), dscale_S, (dgate, dup, ddown)


class GeluSublnSteps(NamedTuple):
    """Forward and backward of GELU experts with an inner norm, like `SwigluSteps`; `project` computes GELU's input.

    The statistics of a row are the mean and the inverse standard deviation of its norm.
    """

    eps: float

    def project(self, x_RD: Tensor, weights: Tensors, products: Products, known_rows: Tensors = ()) -> Tensors:
        return (products.linear(x_RD, weights[0], weights[1], *known_rows),)

    def finish(self, hidden: Tensors, weights: Tensors, products: Products) -> tuple[Tensor, Tensors]:
        _, _, norm_weight_EF, norm_bias_EF, fc2_EDF, fc2_bias_ED = weights
        normed_RF, *statistics = ops.gelu_norm_forward(
            *hidden, norm_weight_EF, norm_bias_EF, *products.tiles[:3], self.eps, products.tiles.rows
        )
        return products.linear(normed_RF, fc2_EDF, fc2_bias_ED), tuple(statistics)

    def backward(
        self, dout_RD: Tensor, x_RD: Tensor, hidden: Tensors, statistics: Tensors, weights: Tensors, products: Products,
        scales: Scales,
    ) -> tuple[Parts, Tensor, Tensors]:  # fmt: skip
        fc1_EFD, _, norm_weight_EF, norm_bias_EF, fc2_EDF, fc2_bias_ED = weights
        dnormed_RF = products.backward(dout_RD, fc2_EDF)
        dinner_RF, normed_RF, dscale_S = ops.gelu_norm_backward(
            *hidden, dnormed_RF, *statistics, norm_weight_EF, norm_bias_EF, dout_RD, fc2_bias_ED, *scales,
            *products.tiles[:3], products.tiles.rows,
        )  # fmt: skip
        dfc2 = products.outer(dout_RD, normed_RF)
        del normed_RF
        dnorm_weight, dnorm_bias = ops.norm_sums(*hidden, dnormed_RF, *statistics, *scales, products.tiles.offset_E1)
        dfc2_bias = ops.row_sums(dout_RD, *scales, products.tiles.offset_E1)
        dfc1 = products.outer(dinner_RF, x_RD)
        dfc1_bias = ops.row_sums(dinner_RF, None, None, products.tiles.offset_E1)
        dweights = (dfc1, dfc1_bias, dnorm_weight, dnorm_bias, dfc2, dfc2_bias)
        return (products.backward(dinner_RF, fc1_EFD), None), dscale_S, dweights


ExpertSteps = SwigluSteps | GeluSublnSteps


def steps_of(function: Function) -> ExpertSteps:
    """Return the steps of experts that compute `function`."""
    return GeluSublnSteps(function.eps) if isinstance(function, GeluSubln) else SwigluSteps()


def _kept_hidden(hidden: Tensors, recompute: float, products: Products) -> Tensors:
    """Return the hidden values of all rows but a share `recompute` at the end, which the backward reuses.

    Nothing is kept if `products` cannot take known rows (`skips_known_rows`).
    """
    if recompute == 0:
        return hidden
    if not products.skips_known_rows:
        return ()
    rows = len(hidden[0])
    kept_rows = rows - round(recompute * rows)
    # A slice would keep the memory of all rows, so it is copied.
    return tuple(values[:kept_rows].clone() for values in hidden) if kept_rows else ()


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: ExpertSteps, make_products: type[Products], recompute: float, expert_NK: Tensor | SortedRoutes,
        x_ND: Tensor, gate_NK: Tensor, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        x_ND, gate_NK, weights = x_ND.contiguous(), gate_NK.contiguous(), tuple(w.contiguous() for w in weights)
        experts = len(weights[0])
        tile_rows = rows_per_tile(gate_NK.numel(), experts)
        routes = sorted_routes(expert_NK, experts, tile_rows)
        products = make_products(Tiles(*routes[2:], tile_rows))
        x_RD = gather_rows(x_ND, routes.route_R, gate_NK.shape[1])
        hidden = steps.project(x_RD, weights, products)
        out_RD, statistics = steps.finish(hidden, weights, products)
        ctx.steps, ctx.make_products, ctx.recompute, ctx.tile_rows = steps, make_products, recompute, tile_rows
        ctx.counts = len(weights), len(statistics)
        # If the backward recomputes all hidden rows, it also gathers the sorted rows again, so only the unsorted rows
        # are saved.
        x = x_ND if recompute == 1 else x_RD
        ctx.save_for_backward(*routes, gate_NK, x, *weights, *statistics, *_kept_hidden(hidden, recompute, products))
        y_ND: Tensor = combine_rows(out_RD, None, routes.slot_NK, gate_NK)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        routes, gate_NK, x = SortedRoutes(*saved[:5]), saved[5], saved[6]
        weights, statistics, hidden = split(saved[7:], *ctx.counts)
        products, top_k = ctx.make_products(Tiles(*routes[2:], ctx.tile_rows)), gate_NK.shape[1]
        x_RD = gather_rows(x, routes.route_R, top_k) if ctx.recompute == 1 else x
        if ctx.recompute:
            hidden = ctx.steps.project(x_RD, weights, products, hidden)
        dout_RD = gather_rows(dy_ND.contiguous(), routes.route_R, top_k)
        scales = Scales(gate_NK, routes.route_R)
        (dx_RD, second_RD), dgate_S, dweights = ctx.steps.backward(
            dout_RD, x_RD, hidden, statistics, weights, products, scales
        )
        dx_ND = combine_rows(dx_RD, second_RD, routes.slot_NK, None)
        return None, None, None, None, dx_ND, dgate_S.view_as(gate_NK).to(gate_NK.dtype), *dweights


_routed_experts: Callable[..., Tensor] = _RoutedExperts.apply


def run(
    make_products: type[Products],
    x_ND: Tensor,
    expert_NK: Tensor | SortedRoutes,
    gate_NK: Tensor,
    weights: ExpertWeights,
) -> Tensor:
    """Run routed rows through experts, as `mhmoe_kernels.run_experts` does, in float32 or bfloat16.

    Sorted routes must have tiles of `rows_per_tile`.
    """
    steps, recompute = steps_of(weights.function), weights.recompute if torch.is_grad_enabled() else 0.0
    return _routed_experts(steps, make_products, recompute, expert_NK, x_ND, gate_NK, *weights.stacked)
