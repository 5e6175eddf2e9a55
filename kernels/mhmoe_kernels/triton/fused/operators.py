"""Operators of the fused experts, SwiGLU and GELU. The two kinds keep different tensors for their backward.

`weights` are stacked over experts, in the order of the arguments of `Swiglu` or `GeluSubln`. A scale is the gate of a
route; scales are in the order of routes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mhmoe_kernels.operators import operator
from mhmoe_kernels.triton.fused.blocks import Blocks, Kernel, blocks_for
from mhmoe_kernels.triton.fused.chunks import chunk_widths
from mhmoe_kernels.triton.fused.gelu import gelu_backward_rows, gelu_backward_weights, gelu_forward, weighted_row_sums
from mhmoe_kernels.triton.fused.swiglu import swiglu_backward_rows, swiglu_backward_weights, swiglu_forward
from mhmoe_kernels.triton.operators import launch, schedule_tiles

Tensors = list[Tensor]


def kernel_options(experts: int, top_k: int, width: int, hidden: int, block: Blocks) -> dict[str, Any]:
    """Return the constants and compiler options of a fused kernel."""
    return {
        "F": hidden,
        "E": experts,
        "K": top_k,
        "D": width,
        "CHUNKS": chunk_widths(width),
        "BLOCK_R": block.rows,
        "BLOCK_F": block.hidden,
        "num_warps": block.warps,
        "num_stages": block.stages,
    }


def _float32(device_tensor: Tensor, *shape: int) -> Tensor:
    return device_tensor.new_empty(shape, dtype=torch.float32)


class _KernelSetup:
    def __init__(self, kind: str, kernel: Kernel, weights: Tensors, x_ND: Tensor, top_k: int) -> None:
        self.experts, self.hidden, self.width = weights[0].shape
        self.block = blocks_for(kind, kernel, self.width, x_ND.dtype)
        self.options = kernel_options(self.experts, top_k, self.width, self.hidden, self.block)

    def tiles(self, offset_E1: Tensor, routes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Divide sorted routes into tiles for this kernel; return offset_E1, expert_T and start_T."""
        tiles: tuple[Tensor, Tensor, Tensor] = schedule_tiles(offset_E1.diff(), routes, self.block.rows)
        return tiles

    @property
    def weights_grid(self) -> tuple[int, int]:
        return triton.cdiv(self.hidden, self.block.hidden), self.experts


def _empty_statistics(kind: str, x_ND: Tensor, routes: int) -> Tensors:
    return [] if kind == "swiglu" else [_float32(x_ND, routes) for _ in range(2)]


def norm_terms(kind: str, weights: Sequence[Tensor]) -> Tensors:
    """Return s = W2 w and c = W2 b + b2 of each GELU expert (see gelu.py); SwiGLU experts have no such terms.

    W2 and b2 are fc2's weight and bias, w and b the norm's. The terms are float32: mean * s is subtracted from a sum of
    similar size, which amplifies rounding errors.
    """
    if kind == "swiglu":
        return []
    _, _, norm_weight_EF, norm_bias_EF, fc2_EDF, fc2_bias_ED = weights
    s_ED, c_ED = (fc2_EDF.float() @ torch.stack((norm_weight_EF, norm_bias_EF), -1).float()).unbind(-1)
    return [s_ED.contiguous(), c_ED + fc2_bias_ED.float()]


@operator(
    launches=3,
    fake=lambda kind, eps, x_ND, weights, terms, route_R, offset_E1, top_k: (
        x_ND.new_empty(len(route_R), x_ND.shape[1]),
        _empty_statistics(kind, x_ND, len(route_R)),
    ),
)
def fused_forward(
    kind: str, eps: float, x_ND: Tensor, weights: Tensors, terms: Tensors, route_R: Tensor, offset_E1: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensors]:  # fmt: skip
    """Return the unscaled expert output of every sorted route, and its norm's mean and inverse deviation (GELU only).

    `terms` are the `norm_terms` of the weights; `route_R` and `offset_E1` are as in `SortedRoutes`.
    """
    routes = len(route_R)
    out_RD = x_ND.new_empty(routes, x_ND.shape[1])
    statistics = _empty_statistics(kind, x_ND, routes)
    if not routes:
        return out_RD, statistics
    setup = _KernelSetup(kind, "forward", weights, x_ND, top_k)
    tiles = setup.tiles(offset_E1, routes)
    grid = (len(tiles[1]),)
    if kind == "swiglu":
        launch(swiglu_forward, grid)(x_ND, *weights, route_R, *tiles, out_RD, **setup.options)
        return out_RD, statistics
    fc1_EFD, fc1_bias_EF, norm_weight_EF, _, fc2_EDF, _ = weights
    launch(gelu_forward, grid)(
        x_ND, fc1_EFD, fc1_bias_EF, norm_weight_EF, fc2_EDF, *terms, route_R, *tiles, out_RD, *statistics,
        eps, **setup.options,
    )  # fmt: skip
    return out_RD, statistics


@operator(
    launches=3,
    fake=lambda kind, x_ND, dy_ND, scale_S, weights, terms, statistics, route_R, offset_E1, top_k: (
        x_ND.new_empty(len(route_R), x_ND.shape[1]),
        _float32(x_ND, scale_S.numel()),
        _empty_statistics(kind, x_ND, len(route_R)),
    ),
)
def fused_backward_rows(
    kind: str, x_ND: Tensor, dy_ND: Tensor, scale_S: Tensor, weights: Tensors, terms: Tensors, statistics: Tensors,
    route_R: Tensor, offset_E1: Tensor, top_k: int,
) -> tuple[Tensor, Tensor, Tensors]:  # fmt: skip
    """Return the gradients of the row and of the scale of every route, and two more statistics (GELU only).

    They are the means A and C that gelu.py defines and `fused_backward_weights` needs.
    """
    routes = len(route_R)
    dx_RD, dscale_S = x_ND.new_empty(routes, x_ND.shape[1]), _float32(x_ND, routes)
    row_statistics = _empty_statistics(kind, x_ND, routes)
    if not routes:
        return dx_RD, dscale_S, row_statistics
    setup = _KernelSetup(kind, "backward_rows", weights, x_ND, top_k)
    tiles = setup.tiles(offset_E1, routes)
    kernel = swiglu_backward_rows
    if kind != "swiglu":
        fc1_EFD, fc1_bias_EF, norm_weight_EF, _, fc2_EDF, _ = weights
        kernel, weights = gelu_backward_rows, [fc1_EFD, fc1_bias_EF, norm_weight_EF, fc2_EDF]
    launch(kernel, (len(tiles[1]),))(
        x_ND, dy_ND, *weights, *terms, *statistics, route_R, scale_S, *tiles, dx_RD, dscale_S, *row_statistics,
        **setup.options,
    )  # fmt: skip
    return dx_RD, dscale_S, row_statistics


@operator(launches=2, fake=lambda kind, x_ND, dy_ND, scale_S, weights, *_: [torch.empty_like(w) for w in weights])
def fused_backward_weights(
    kind: str, x_ND: Tensor, dy_ND: Tensor, scale_S: Tensor, weights: Tensors, statistics: Tensors,
    route_R: Tensor, offset_E1: Tensor, top_k: int,
) -> Tensors:  # fmt: skip
    """Return the gradients of the weights; `statistics` has those of `fused_forward`, then of `fused_backward_rows`."""
    setup = _KernelSetup(kind, "backward_weights", weights, x_ND, top_k)
    gradients = [torch.empty_like(w) for w in weights]
    if kind == "swiglu":
        launch(swiglu_backward_weights, setup.weights_grid)(
            x_ND, dy_ND, *weights, route_R, scale_S, offset_E1, *gradients, **setup.options
        )
        return gradients
    launch(gelu_backward_weights, setup.weights_grid)(
        x_ND, dy_ND, *weights[:5], *statistics, route_R, scale_S, offset_E1, *gradients[:5],
        **setup.options,
    )  # fmt: skip
    width = min(128, triton.next_power_of_2(setup.width))
    launch(weighted_row_sums, (triton.cdiv(setup.width, width), setup.experts))(
        dy_ND, route_R, scale_S, offset_E1, gradients[5], top_k, setup.width, 32, width
    )
    return gradients
