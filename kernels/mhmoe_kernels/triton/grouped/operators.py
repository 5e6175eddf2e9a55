"""Operators of experts as grouped matrix products: products, activations, norms and sums."""

import torch
import triton
from torch import Tensor

from mhmoe_kernels.operators import operator
from mhmoe_kernels.triton.grouped import gelu, product, swiglu
from mhmoe_kernels.triton.grouped.blocks import linear_blocks, outer_blocks
from mhmoe_kernels.triton.operators import device_capability, launch, program_count


def _fake_linear(
    x_RI: Tensor, w_EMN: Tensor, x2_RI: Tensor | None, w2_EMN: Tensor | None, bias_EO: Tensor | None,
    known_PO: Tensor | None, offset_E1: Tensor, expert_T: Tensor, start_T: Tensor, transposed: bool, rows_per_tile: int,
) -> Tensor:  # fmt: skip
    return x_RI.new_empty(len(x_RI), w_EMN.shape[1 if transposed else 2])


@operator(launches=1, fake=_fake_linear)
def grouped_linear(
    x_RI: Tensor, w_EMN: Tensor, x2_RI: Tensor | None, w2_EMN: Tensor | None, bias_EO: Tensor | None,
    known_PO: Tensor | None, offset_E1: Tensor, expert_T: Tensor, start_T: Tensor, transposed: bool, rows_per_tile: int,
) -> Tensor:  # fmt: skip
    """Return x_r @ w_e + x2_r @ w2_e + bias_e for the rows r of each expert e, added in float32.

    Rows are sorted by expert. Matrices are [in, out], or [out, in] if transposed. `known_PO` are first rows of the
    result that need not be computed; offset_E1, expert_T and start_T are as in `SortedRoutes`.
    """
    y_RO = _fake_linear(
        x_RI, w_EMN, x2_RI, w2_EMN, bias_EO, known_PO, offset_E1, expert_T, start_T, transposed, rows_per_tile
    )
    out_width, in_width = y_RO.shape[1], x_RI.shape[1]
    if len(x_RI):
        block = linear_blocks(rows_per_tile, out_width, x_RI.dtype, device_capability(x_RI.device))
        tiles = len(expert_T) * triton.cdiv(out_width, block.out)
        launch(product.grouped_linear, (min(tiles, program_count(x_RI.device)),))(
            x_RI, w_EMN,
            x_RI if x2_RI is None else x2_RI, w_EMN if w2_EMN is None else w2_EMN,
            x_RI if bias_EO is None else bias_EO, x_RI if known_PO is None else known_PO,
            y_RO, offset_E1, expert_T, start_T, len(expert_T), 0 if known_PO is None else len(known_PO), in_width,
            out_width, len(w_EMN),
            TRANSPOSED=transposed, HAS_SECOND=x2_RI is not None, HAS_BIAS=bias_EO is not None,
            HAS_KNOWN_ROWS=known_PO is not None, IS_EVEN=in_width % block.inner == 0,
            BLOCK_ROWS=rows_per_tile, BLOCK_OUT=block.out, BLOCK_IN=block.inner,
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
    return y_RO


@operator(
    launches=1,
    fake=lambda a_RO, b_RI, offset_E1: a_RO.new_empty(len(offset_E1) - 1, a_RO.shape[1], b_RI.shape[1]),
)
def grouped_outer(a_RO: Tensor, b_RI: Tensor, offset_E1: Tensor) -> Tensor:
    """Return the gradient dw_EOI of matrices: the sum of a_r^T b_r over the rows r of each expert, in float32."""
    experts, out_width, in_width = len(offset_E1) - 1, a_RO.shape[1], b_RI.shape[1]
    dw_EOI = a_RO.new_empty(experts, out_width, in_width)
    block_out, block = outer_blocks(out_width, in_width, a_RO.dtype, device_capability(a_RO.device))
    tiles = experts * triton.cdiv(out_width, block_out) * triton.cdiv(in_width, block.out)
    launch(product.grouped_outer, (min(tiles, program_count(a_RO.device)),))(
        a_RO, b_RI, dw_EOI, offset_E1, out_width, in_width, experts,
        BLOCK_ROWS=block.inner, BLOCK_OUT=block_out, BLOCK_IN=block.out,
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return dw_EOI


# torch's own fake implementation of grouped_mm asks a real GPU for its compute capability. So the products by
# grouped_mm are operators of this package, with other fake implementations. grouped_mm launches two kernels, one of
# which prepares the addresses of groups.
@operator(
    launches=2,
    fake=lambda x_RI, w_EMN, offset_E1, transposed: x_RI.new_empty(len(x_RI), w_EMN.shape[1 if transposed else 2]),
)
def torch_linear(x_RI: Tensor, w_EMN: Tensor, offset_E1: Tensor, transposed: bool) -> Tensor:
    """Compute x_r @ w_e of `grouped_linear` by torch's grouped_mm."""
    w_EIO = w_EMN.transpose(1, 2) if transposed else w_EMN
    # Tensors without rows have no address, which CUTLASS may not accept.
    if not len(x_RI):
        return x_RI.new_empty(0, w_EIO.shape[2])
    return torch.nn.functional.grouped_mm(x_RI, w_EIO, offs=offset_E1[1:])


@operator(
    launches=2,
    fake=lambda a_RO, b_RI, offset_E1: a_RO.new_empty(len(offset_E1) - 1, a_RO.shape[1], b_RI.shape[1]),
)
def torch_outer(a_RO: Tensor, b_RI: Tensor, offset_E1: Tensor) -> Tensor:
    """Compute `grouped_outer` by torch's grouped_mm."""
    if not len(a_RO):
        return a_RO.new_zeros(len(offset_E1) - 1, a_RO.shape[1], b_RI.shape[1])
    return torch.nn.functional.grouped_mm(a_RO.T, b_RI, offs=offset_E1[1:])


@operator(launches=1, fake=lambda gate_RF, up_RF: torch.empty_like(gate_RF))
def swiglu_forward(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    """Return silu(gate) * up of SwiGLU experts, computed in float32 by one kernel."""
    hidden_RF = torch.empty_like(gate_RF)
    if hidden_RF.numel():
        launch(swiglu.swiglu_forward, (triton.cdiv(hidden_RF.numel(), 1024),))(
            gate_RF, up_RF, hidden_RF, hidden_RF.numel(), 1024
        )
    return hidden_RF


def _empty_scale_gradient(scale_S: Tensor) -> Tensor:
    return scale_S.new_empty(scale_S.numel(), dtype=torch.float32)


@operator(
    launches=1,
    fake=lambda gate_RF, up_RF, dhidden_RF, scale_S, route_R: (
        *(torch.empty_like(gate_RF) for _ in range(3)),
        _empty_scale_gradient(scale_S),
    ),
)
def swiglu_backward(
    gate_RF: Tensor, up_RF: Tensor, dhidden_RF: Tensor, scale_S: Tensor, route_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up and the hidden values, all times the scales, and the scales' gradient.

    `dhidden_RF` is without the scales, the gates in the order of routes; `route_R` has the route of each slot.
    """
    count, width = gate_RF.shape
    dgate_RF, dup_RF, hidden_RF = (torch.empty_like(gate_RF) for _ in range(3))
    dscale_S = _empty_scale_gradient(scale_S)
    if count:
        block_columns = min(512, max(16, triton.next_power_of_2(width)))
        block_rows = max(1, 2048 // block_columns)
        launch(swiglu.swiglu_backward, (triton.cdiv(count, block_rows),))(
            gate_RF, up_RF, dhidden_RF, scale_S, route_R, dgate_RF, dup_RF, hidden_RF, dscale_S, count, width,
            block_rows, block_columns,
        )  # fmt: skip
    return dgate_RF, dup_RF, hidden_RF, dscale_S


def _tile_grid(expert_T: Tensor, rows_per_tile: int, block_rows: int) -> tuple[int, int]:
    return len(expert_T), triton.cdiv(rows_per_tile, block_rows)


@operator(
    launches=1,
    fake=lambda inner_RF, norm_weight_EF, norm_bias_EF, offset_E1, expert_T, start_T, eps, rows_per_tile: (
        torch.empty_like(inner_RF),
        *(inner_RF.new_empty(len(inner_RF), dtype=torch.float32) for _ in range(2)),
    ),
)
def gelu_norm_forward(
    inner_RF: Tensor, norm_weight_EF: Tensor, norm_bias_EF: Tensor, offset_E1: Tensor, expert_T: Tensor,
    start_T: Tensor, eps: float, rows_per_tile: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return norm(gelu(inner)) of GELU experts, and the mean and 1/deviation of gelu(inner) over each row."""
    normed_RF = torch.empty_like(inner_RF)
    mean_R, rstd_R = (inner_RF.new_empty(len(inner_RF), dtype=torch.float32) for _ in range(2))
    if len(inner_RF):
        block_rows, block_columns = _norm_blocks(inner_RF.shape[1])
        launch(gelu.gelu_norm_forward, _tile_grid(expert_T, rows_per_tile, block_rows))(
            inner_RF, norm_weight_EF, norm_bias_EF, offset_E1, expert_T, start_T, normed_RF, mean_R, rstd_R,
            eps, inner_RF.shape[1], len(norm_weight_EF), block_rows, block_columns,
        )  # fmt: skip
    return normed_RF, mean_R, rstd_R


def _norm_blocks(width: int) -> tuple[int, int]:
    columns = min(512, max(16, triton.next_power_of_2(width)))
    return max(1, min(16, 2048 // columns)), columns


@operator(
    launches=1,
    fake=lambda inner_RF, dnormed_RF, mean_R, rstd_R, norm_weight_EF, norm_bias_EF, dout_RD, out_bias_ED, scale_S, *_: (
        torch.empty_like(inner_RF),
        torch.empty_like(inner_RF),
        _empty_scale_gradient(scale_S),
    ),
)
def gelu_norm_backward(
    inner_RF: Tensor, dnormed_RF: Tensor, mean_R: Tensor, rstd_R: Tensor, norm_weight_EF: Tensor, norm_bias_EF: Tensor,
    dout_RD: Tensor, out_bias_ED: Tensor, scale_S: Tensor, route_R: Tensor, offset_E1: Tensor,
    expert_T: Tensor, start_T: Tensor, rows_per_tile: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradient of GELU's input and the normed values, both times the scales, and the scales' gradient."""
    dinner_RF, normed_RF = torch.empty_like(inner_RF), torch.empty_like(inner_RF)
    dscale_S = _empty_scale_gradient(scale_S)
    if len(inner_RF):
        block_rows, block_columns = _norm_blocks(inner_RF.shape[1])
        launch(gelu.gelu_norm_backward, _tile_grid(expert_T, rows_per_tile, block_rows))(
            inner_RF, dnormed_RF, mean_R, rstd_R, norm_weight_EF, norm_bias_EF, dout_RD, out_bias_ED,
            scale_S, route_R, offset_E1, expert_T, start_T, dinner_RF, normed_RF, dscale_S,
            inner_RF.shape[1], dout_RD.shape[1], len(norm_weight_EF), block_rows, block_columns,
        )  # fmt: skip
    return dinner_RF, normed_RF, dscale_S


@operator(
    launches=1,
    fake=lambda inner_RF, dnormed_RF, mean_R, rstd_R, scale_S, route_R, offset_E1: tuple(
        inner_RF.new_empty(len(offset_E1) - 1, inner_RF.shape[1]) for _ in range(2)
    ),
)
def norm_sums(
    inner_RF: Tensor, dnormed_RF: Tensor, mean_R: Tensor, rstd_R: Tensor, scale_S: Tensor, route_R: Tensor,
    offset_E1: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of each norm's weight and bias, added over rows in float32."""
    experts, width = len(offset_E1) - 1, inner_RF.shape[1]
    dweight_EF, dbias_EF = (inner_RF.new_empty(experts, width) for _ in range(2))
    block_columns = min(128, triton.next_power_of_2(width))
    launch(gelu.norm_sums, (triton.cdiv(width, block_columns), experts))(
        inner_RF, dnormed_RF, mean_R, rstd_R, scale_S, route_R, offset_E1, dweight_EF, dbias_EF, width, 32,
        block_columns,
    )  # fmt: skip
    return dweight_EF, dbias_EF


@operator(launches=1, fake=lambda x_RF, scale_S, route_R, offset_E1: x_RF.new_empty(len(offset_E1) - 1, x_RF.shape[1]))
def row_sums(x_RF: Tensor, scale_S: Tensor | None, route_R: Tensor | None, offset_E1: Tensor) -> Tensor:
    """Return the sum of each expert's rows, times their scales if any, in float32."""
    experts, width = len(offset_E1) - 1, x_RF.shape[1]
    sum_EF = x_RF.new_empty(experts, width)
    block_columns = min(128, triton.next_power_of_2(width))
    # The kernel needs a pointer for each argument. Without scales it does not read theirs.
    scales = (x_RF, x_RF) if scale_S is None or route_R is None else (scale_S, route_R)
    launch(gelu.row_sums, (triton.cdiv(width, block_columns), experts))(
        x_RF, *scales, offset_E1, sum_EF, width, scale_S is not None, 32, block_columns
    )
    return sum_EF
