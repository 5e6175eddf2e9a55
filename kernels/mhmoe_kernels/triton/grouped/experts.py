"""Experts as grouped products with small kernels around them, and their backward, on rows that are sorted by expert.

The backward is written by hand. From the forward it keeps the rows and, for SwiGLU, gate and up, or for GELU the input
of the GELU and two numbers per row. Outputs of experts are not kept: the gradient of a gate is a product of hidden
values with their gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.triton.grouped import operators as ops
from mhmoe_kernels.triton.grouped.blocks import rows_per_tile
from mhmoe_kernels.triton.operators import SortedRoutes, combine_rows, gather_rows, schedule_tiles, sort_routes
from mhmoe_kernels.weights import ExpertWeights, Function, Swiglu

Tensors = tuple[Tensor, ...]


class Tiles(NamedTuple):
    """Tiles of sorted rows, as in `SortedRoutes`."""

    offset_E1: Tensor
    expert_T: Tensor
    start_T: Tensor
    rows: int
    """Largest number of rows of a tile."""

    def linear(self, x_RI: Tensor, w_EOI: Tensor, bias_EO: Tensor | None = None) -> Tensor:
        """Return F.linear of each row with the matrix and the bias of its expert."""
        y_RO: Tensor = ops.grouped_linear(x_RI, w_EOI, None, None, bias_EO, *self[:3], True, self.rows)
        return y_RO

    def backward(self, dy_RO: Tensor, w_EOI: Tensor) -> Tensor:
        """Return the gradient of the rows for the gradient `dy_RO` of `linear`."""
        dx_RI: Tensor = ops.grouped_linear(dy_RO, w_EOI, None, None, None, *self[:3], False, self.rows)
        return dx_RI

    def backward_sum(self, dy_RO: Tensor, w_EOI: Tensor, dy2_RO: Tensor, w2_EOI: Tensor) -> Tensor:
        """Return the gradient of rows that are the input of two products."""
        dx_RI: Tensor = ops.grouped_linear(dy_RO, w_EOI, dy2_RO, w2_EOI, None, *self[:3], False, self.rows)
        return dx_RI


class Scales(NamedTuple):
    """Scale of each route, in the order of routes, and the route of each slot; both None if there are no scales."""

    scale_S: Tensor | None = None
    route_R: Tensor | None = None


class ExpertSteps(Protocol):
    """Forward and backward of one kind of experts on sorted rows."""

    def forward(self, x_RD: Tensor, weights: Tensors, tiles: Tiles) -> tuple[Tensor, Tensors]:
        """Return the expert's output of each row, and the tensors to keep for the backward."""

    def backward(
        self, dout_RD: Tensor, x_RD: Tensor, kept: Tensors, weights: Tensors, tiles: Tiles, scales: Scales
    ) -> tuple[Tensor, Tensor, Tensors]:
        """Return the gradients of the rows, of the scales and of the weights.

        Args:
            dout_RD: gradient of the output after the scale.
            x_RD: rows of the forward pass.
            kept: tensors that `forward` kept.
            weights: weights of the experts.
            tiles: tiles of the rows.
            scales: scales by which the outputs were multiplied.
        """


class SwigluSteps:
    """SwiGLU experts; gate and up are kept."""

    def forward(self, x_RD: Tensor, weights: Tensors, tiles: Tiles) -> tuple[Tensor, Tensors]:
        gate_EFD, up_EFD, down_EDF = weights
        gate_RF, up_RF = tiles.linear(x_RD, gate_EFD), tiles.linear(x_RD, up_EFD)
        return tiles.linear(ops.swiglu_forward(gate_RF, up_RF), down_EDF), (gate_RF, up_RF)

    def backward(
        self, dout_RD: Tensor, x_RD: Tensor, kept: Tensors, weights: Tensors, tiles: Tiles, scales: Scales
    ) -> tuple[Tensor, Tensor, Tensors]:
        gate_EFD, up_EFD, down_EDF = weights
        dhidden_RF = tiles.backward(dout_RD, down_EDF)
        dgate_RF, dup_RF, hidden_RF, dscale_S = ops.swiglu_backward(*kept, dhidden_RF, *scales)
        del dhidden_RF
        ddown = ops.grouped_outer(dout_RD, hidden_RF, tiles.offset_E1)
        del hidden_RF
        dgate, dup = (ops.grouped_outer(d_RF, x_RD, tiles.offset_E1) for d_RF in (dgate_RF, dup_RF))
        return tiles.backward_sum(dgate_RF, gate_EFD, dup_RF, up_EFD), dscale_S, (dgate, dup, ddown)


class GeluSublnSteps(NamedTuple):
    """GELU experts with biases and an inner norm; the input of the GELU, the mean and the deviation are kept."""

    eps: float

    def forward(self, x_RD: Tensor, weights: Tensors, tiles: Tiles) -> tuple[Tensor, Tensors]:
        fc1_EFD, fc1_bias_EF, norm_weight_EF, norm_bias_EF, fc2_EDF, fc2_bias_ED = weights
        inner_RF = tiles.linear(x_RD, fc1_EFD, fc1_bias_EF)
        normed_RF, mean_R, rstd_R = ops.gelu_norm_forward(
            inner_RF, norm_weight_EF, norm_bias_EF, *tiles[:3], self.eps, tiles.rows
        )
        return tiles.linear(normed_RF, fc2_EDF, fc2_bias_ED), (inner_RF, mean_R, rstd_R)

    def backward(
        self, dout_RD: Tensor, x_RD: Tensor, kept: Tensors, weights: Tensors, tiles: Tiles, scales: Scales
    ) -> tuple[Tensor, Tensor, Tensors]:
        fc1_EFD, _, norm_weight_EF, norm_bias_EF, fc2_EDF, fc2_bias_ED = weights
        inner_RF, mean_R, rstd_R = kept
        dnormed_RF = tiles.backward(dout_RD, fc2_EDF)
        dinner_RF, normed_RF, dscale_S = ops.gelu_norm_backward(
            inner_RF, dnormed_RF, mean_R, rstd_R, norm_weight_EF, norm_bias_EF, dout_RD, fc2_bias_ED, *scales,
            *tiles[:3], tiles.rows,
        )  # fmt: skip
        dfc2 = ops.grouped_outer(dout_RD, normed_RF, tiles.offset_E1)
        del normed_RF
        dnorm_weight, dnorm_bias = ops.norm_sums(inner_RF, dnormed_RF, mean_R, rstd_R, *scales, tiles.offset_E1)
        dfc2_bias = ops.row_sums(dout_RD, *scales, tiles.offset_E1)
        dfc1 = ops.grouped_outer(dinner_RF, x_RD, tiles.offset_E1)
        dfc1_bias = ops.row_sums(dinner_RF, None, None, tiles.offset_E1)
        dweights = (dfc1, dfc1_bias, dnorm_weight, dnorm_bias, dfc2, dfc2_bias)
        return tiles.backward(dinner_RF, fc1_EFD), dscale_S, dweights


def steps_of(function: Function) -> ExpertSteps:
    """Return the forward and backward of experts that compute `function`."""
    return SwigluSteps() if isinstance(function, Swiglu) else GeluSublnSteps(function.eps)


class _RoutedExperts(torch.autograd.Function):
    """y_n = sum_k gate_nk * expert_{expert_nk}(x_n)."""

    @staticmethod
    def forward(
        ctx: Any, steps: ExpertSteps, recompute: bool, expert_NK: Tensor, x_ND: Tensor, gate_NK: Tensor,
        *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        x_ND, gate_NK, weights = x_ND.contiguous(), gate_NK.contiguous(), tuple(w.contiguous() for w in weights)
        experts = len(weights[0])
        tile_rows = rows_per_tile(expert_NK.numel(), experts)
        routes = SortedRoutes(*sort_routes(expert_NK, experts, tile_rows))
        tiles = Tiles(*routes[2:], tile_rows)
        x_RD = gather_rows(x_ND, routes.route_R, expert_NK.shape[1])
        out_RD, kept = steps.forward(x_RD, weights, tiles)
        ctx.steps, ctx.recompute, ctx.tile_rows, ctx.weight_count = steps, recompute, tile_rows, len(weights)
        ctx.save_for_backward(*routes, gate_NK, *weights, *((x_ND,) if recompute else (x_RD, *kept)))
        y_ND: Tensor = combine_rows(out_RD, routes.slot_NK, gate_NK)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        routes, gate_NK, weights = SortedRoutes(*saved[:5]), saved[5], saved[6 : 6 + ctx.weight_count]
        x, *kept = saved[6 + ctx.weight_count :]
        tiles, top_k = Tiles(*routes[2:], ctx.tile_rows), gate_NK.shape[1]
        if ctx.recompute:
            x = gather_rows(x, routes.route_R, top_k)
            kept = ctx.steps.forward(x, weights, tiles)[1]
        dout_RD = gather_rows(dy_ND.contiguous(), routes.route_R, top_k)
        dx_RD, dgate_S, dweights = ctx.steps.backward(
            dout_RD, x, tuple(kept), weights, tiles, Scales(gate_NK, routes.route_R)
        )
        del dout_RD
        dx_ND = combine_rows(dx_RD, routes.slot_NK, None)
        return None, None, None, dx_ND, dgate_S.view_as(gate_NK).to(gate_NK.dtype), *dweights


class _SortedExperts(torch.autograd.Function):
    """Output of the expert of each row, for rows that are sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any, steps: ExpertSteps, recompute: bool, tiles: Tiles, x_RD: Tensor, *weights: Tensor
    ) -> Tensor:
        x_RD, weights = x_RD.contiguous(), tuple(w.contiguous() for w in weights)
        out_RD, kept = steps.forward(x_RD, weights, tiles)
        ctx.steps, ctx.recompute, ctx.tiles, ctx.weight_count = steps, recompute, tiles, len(weights)
        ctx.save_for_backward(x_RD, *weights, *(() if recompute else kept))
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, *saved = ctx.saved_tensors
        weights, kept = tuple(saved[: ctx.weight_count]), tuple(saved[ctx.weight_count :])
        if ctx.recompute:
            kept = ctx.steps.forward(x_RD, weights, ctx.tiles)[1]
        dx_RD, _, dweights = ctx.steps.backward(dout_RD.contiguous(), x_RD, kept, weights, ctx.tiles, Scales())
        return None, None, None, dx_RD, *dweights


_routed_experts: Callable[..., Tensor] = _RoutedExperts.apply
_sorted_experts: Callable[..., Tensor] = _SortedExperts.apply


def run(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts, as `mhmoe_kernels.run_experts` does, in float32 or bfloat16."""
    steps = steps_of(weights.function)
    return _routed_experts(steps, weights.recompute > 0, expert_NK, x_ND, gate_NK, *weights.stacked)


def run_sorted(x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through their experts, as `mhmoe_kernels.run_sorted_experts` does."""
    tile_rows = rows_per_tile(len(x_RD), len(counts))
    # The host need not wait for the GPU, because the copy is from pinned memory.
    count_E = torch.tensor(counts, dtype=torch.int32, pin_memory=x_RD.is_cuda).to(x_RD.device, non_blocking=True)
    tiles = Tiles(*schedule_tiles(count_E, len(x_RD), tile_rows), tile_rows)
    return _sorted_experts(steps_of(weights.function), weights.recompute > 0, tiles, x_RD, *weights.stacked)
