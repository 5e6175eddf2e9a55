"""Launches of the three kernels of each kind of expert; each kind decides which tensors it keeps between them."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from mhmoe_kernels.triton.blocks import Blocks, blocks_for
from mhmoe_kernels.triton.chunks import chunk_widths
from mhmoe_kernels.triton.gelu import gelu_backward_rows, gelu_backward_weights, gelu_forward, weighted_row_sums
from mhmoe_kernels.triton.schedule import Routes, RowTiles, row_tiles
from mhmoe_kernels.triton.swiglu import swiglu_backward_rows, swiglu_backward_weights, swiglu_forward
from mhmoe_kernels.weights import Function, Swiglu

Tensors = tuple[Tensor, ...]


class ExpertKernels(Protocol):
    """Interface of the kernels of one kind of experts.

    `weights` are stacked over experts, and `scale_R` are the gates of sorted routes.
    """

    def forward(self, x_ND: Tensor, weights: Tensors, routes: Routes) -> tuple[Tensor, Tensors]:
        """Return out_RD, the expert's output of every sorted route without its gate, and the tensors to save.

        `backward_rows` takes the latter as `saved`.
        """

    def backward_rows(
        self, x_ND: Tensor, dy_ND: Tensor, scale_R: Tensor, weights: Tensors, saved: Tensors, routes: Routes
    ) -> tuple[Tensor, Tensor, Tensors]:
        """Return the gradients of the row and of the gate of every sorted route, and the tensors to save.

        `backward_weights` takes the latter as `saved`.
        """

    def backward_weights(
        self, x_ND: Tensor, dy_ND: Tensor, scale_R: Tensor, weights: Tensors, saved: Tensors, routes: Routes
    ) -> Tensors:
        """Return the gradient of each of the `weights`; `saved` comes from `backward_rows`."""


class SwigluKernels:
    """`ExpertKernels` of SwiGLU experts, which save nothing for the backward."""

    def forward(self, x_ND: Tensor, weights: Tensors, routes: Routes) -> tuple[Tensor, Tensors]:
        F, D = weights[0].shape[1:]
        block = blocks_for("swiglu", "forward", D, x_ND.dtype)
        tiles = row_tiles(routes, block.rows)
        out_RD = x_ND.new_empty(len(routes.row_R), D)
        swiglu_forward[_grid(tiles)](x_ND, *weights, routes.row_R, *tiles, out_RD, F, **kernel_options(D, block))
        return out_RD, ()

    def backward_rows(
        self, x_ND: Tensor, dy_ND: Tensor, scale_R: Tensor, weights: Tensors, saved: Tensors, routes: Routes
    ) -> tuple[Tensor, Tensor, Tensors]:
        F, D = weights[0].shape[1:]
        block = blocks_for("swiglu", "backward_rows", D, x_ND.dtype)
        tiles = row_tiles(routes, block.rows)
        dx_RD, dscale_R = x_ND.new_empty(len(scale_R), D), _float32_like(scale_R)
        swiglu_backward_rows[_grid(tiles)](
            x_ND, dy_ND, *weights, routes.row_R, scale_R, *tiles, dx_RD, dscale_R, F, **kernel_options(D, block)
        )
        return dx_RD, dscale_R, ()

    def backward_weights(
        self, x_ND: Tensor, dy_ND: Tensor, scale_R: Tensor, weights: Tensors, saved: Tensors, routes: Routes
    ) -> Tensors:
        E, F, D = weights[0].shape
        block = blocks_for("swiglu", "backward_weights", D, x_ND.dtype)
        grads = tuple(torch.empty_like(w) for w in weights)
        swiglu_backward_weights[(triton.cdiv(F, block.hidden), E)](
            x_ND, dy_ND, *weights, routes.row_R, scale_R, routes.offset_E1, *grads, F, **kernel_options(D, block)
        )
        return grads


@dataclass
class GeluSublnKernels:
    """`ExpertKernels` of GELU experts with SubLN, which save the mean and the deviation of each route's norm."""

    eps: float

    def forward(self, x_ND: Tensor, weights: Tensors, routes: Routes) -> tuple[Tensor, Tensors]:
        fc1_EFD, fc1_bias_EF, norm_weight_EF, norm_bias_EF, fc2_EDF, fc2_bias_ED = weights
        F, D = fc1_EFD.shape[1:]
        block = blocks_for("gelu", "forward", D, x_ND.dtype)
        tiles = row_tiles(routes, block.rows)
        # These are s and c of gelu.py. They are float32, because mean * s is subtracted from a sum of similar size,
        # which would amplify rounding errors.
        s_ED, c_ED = (fc2_EDF.float() @ torch.stack((norm_weight_EF, norm_bias_EF), -1).float()).unbind(-1)
        s_ED, c_ED = s_ED.contiguous(), c_ED + fc2_bias_ED.float()
        out_RD = x_ND.new_empty(len(routes.row_R), D)
        mean_R, rstd_R = _float32_like(routes.row_R), _float32_like(routes.row_R)
        gelu_forward[_grid(tiles)](
            x_ND, fc1_EFD, fc1_bias_EF, norm_weight_EF, fc2_EDF, s_ED, c_ED, routes.row_R, *tiles,
            out_RD, mean_R, rstd_R, F, self.eps, **kernel_options(D, block),
        )  # fmt: skip
        return out_RD, (s_ED, c_ED, mean_R, rstd_R)

    def backward_rows(
        self, x_ND: Tensor, dy_ND: Tensor, scale_R: Tensor, weights: Tensors, saved: Tensors, routes: Routes
    ) -> tuple[Tensor, Tensor, Tensors]:
        fc1_EFD, fc1_bias_EF, norm_weight_EF, _, fc2_EDF, _ = weights
        F, D = fc1_EFD.shape[1:]
        block = blocks_for("gelu", "backward_rows", D, x_ND.dtype)
        tiles = row_tiles(routes, block.rows)
        dx_RD, dscale_R = x_ND.new_empty(len(scale_R), D), _float32_like(scale_R)
        a_R, c_R = _float32_like(scale_R), _float32_like(scale_R)
        gelu_backward_rows[_grid(tiles)](
            x_ND, dy_ND, fc1_EFD, fc1_bias_EF, norm_weight_EF, fc2_EDF, *saved, routes.row_R, scale_R, *tiles,
            dx_RD, dscale_R, a_R, c_R, F, **kernel_options(D, block),
        )  # fmt: skip
        return dx_RD, dscale_R, (*saved[2:], a_R, c_R)

    def backward_weights(
        self, x_ND: Tensor, dy_ND: Tensor, scale_R: Tensor, weights: Tensors, saved: Tensors, routes: Routes
    ) -> Tensors:
        E, F, D = weights[0].shape
        block = blocks_for("gelu", "backward_weights", D, x_ND.dtype)
        grads = tuple(torch.empty_like(w) for w in weights)
        gelu_backward_weights[(triton.cdiv(F, block.hidden), E)](
            x_ND, dy_ND, *weights[:5], *saved, routes.row_R, scale_R, routes.offset_E1, *grads[:5], F,
            **kernel_options(D, block),
        )  # fmt: skip
        width = min(128, triton.next_power_of_2(D))
        weighted_row_sums[(triton.cdiv(D, width), E)](
            dy_ND, routes.row_R, scale_R, routes.offset_E1, grads[5], D, 32, width, enable_fp_fusion=True
        )
        return grads


def kernels_for(function: Function) -> ExpertKernels:
    return SwigluKernels() if isinstance(function, Swiglu) else GeluSublnKernels(function.eps)


def kernel_options(width: int, block: Blocks) -> dict[str, Any]:
    """Return the constants and the compiler options of a kernel for rows of `width` with these block sizes."""
    return {
        "D": width,
        "CHUNKS": chunk_widths(width),
        "BLOCK_R": block.rows,
        "BLOCK_F": block.hidden,
        "num_warps": block.warps,
        "num_stages": block.stages,
        # This is Triton's default. It is set explicitly, because Triton warns that the default will change.
        "enable_fp_fusion": True,
    }


def _grid(tiles: RowTiles) -> tuple[int]:
    return (len(tiles.expert_T),)


def _float32_like(template: Tensor) -> Tensor:
    return torch.empty_like(template, dtype=torch.float32)
