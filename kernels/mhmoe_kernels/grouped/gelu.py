"""GELU experts, with SubLN (an inner LayerNorm) or without; each expert runs on its own contiguous rows.

With h heads a row has width d/h, and there are h times as many hidden values as with one head, so GELU and norm, which
pass over the hidden layer, cost more than the matrix products. On a CPU, pieces of rows therefore keep their hidden
layer in the cache. The forward keeps one value where autograd keeps three, the GELU's input; for recomputed rows none.
"""

import torch
from torch import Tensor

from mhmoe_kernels.grouped.autograd import SortedKernel, empty_gradients
from mhmoe_kernels.grouped.pieces import (
    GradientAccumulator,
    Piece,
    kept_buffer_rows,
    new_hidden_buffers,
    split_into_pieces,
)
from mhmoe_kernels.operators import compiled_operator
from mhmoe_kernels.permutation import widen


def _gelu_pieces(x_RD: Tensor, count_E: Tensor, fc1_EFD: Tensor, recompute: float) -> list[Piece]:
    is_cpu = x_RD.device.type == "cpu"
    row_bytes = fc1_EFD.shape[1] * x_RD.element_size() if is_cpu else 0
    return split_into_pieces(count_E.tolist(), recompute, round_windows=is_cpu, row_bytes=row_bytes)


def _new_results(
    x_RD: Tensor, count_E: Tensor, eps: float, recompute: float, weights: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    rows = kept_buffer_rows(len(x_RD), recompute, round_windows=x_RD.device.type == "cpu")
    return torch.empty_like(x_RD), [x_RD.new_empty(rows, weights[0].shape[1])]


@compiled_operator(fake=_new_results)
def _grouped_gelu_forward(
    x_RD: Tensor, count_E: Tensor, eps: float, recompute: float, weights: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the experts' outputs, and the kept inputs of GELU."""
    fc1_EFD, fc1_bias_EF, *norm, fc2_EDF, fc2_bias_ED = weights
    width = fc1_EFD.shape[1]
    pieces = _gelu_pieces(x_RD, count_E, fc1_EFD, recompute)
    out_RD, [kept_RF] = _new_results(x_RD, count_E, eps, recompute, weights)
    [temporary_PF] = new_hidden_buffers(1, x_RD, width, [p for p in pieces if not p.keeps_hidden])
    [hidden_PF] = new_hidden_buffers(1, x_RD, width, pieces)
    for piece in pieces:
        e, window, buffer_rows = piece.expert, piece.window, piece.buffer_rows
        inner_PF = kept_RF[window] if piece.keeps_hidden else temporary_PF[buffer_rows]
        torch.addmm(fc1_bias_EF[e], x_RD[window], fc1_EFD[e].T, out=inner_PF)
        gelu = torch.ops.aten.gelu.out(inner_PF, out=hidden_PF[buffer_rows])
        normed = gelu
        if norm:
            norm_F, norm_bias_F = (t[e] for t in norm)
            normed = torch.native_layer_norm(gelu, (width,), norm_F, norm_bias_F, eps)[0]
        torch.addmm(fc2_bias_ED[e], normed, fc2_EDF[e].T, out=out_RD[window])
    return out_RD, [kept_RF]


@compiled_operator(fake=empty_gradients)
def _grouped_gelu_backward(
    dout_RD: Tensor, count_E: Tensor, eps: float, recompute: float, x_RD: Tensor, weights: list[Tensor],
    kept_tensors: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of rows and weights."""
    [kept_RF] = kept_tensors
    fc1_EFD, fc1_bias_EF, *norm, fc2_EDF, _ = weights
    width = fc1_EFD.shape[1]
    pieces = _gelu_pieces(x_RD, count_E, fc1_EFD, recompute)
    dout_RD = dout_RD.contiguous()
    dx_RD = torch.empty_like(x_RD)
    fc1_sum, fc2_sum = (GradientAccumulator(w, pieces) for w in (fc1_EFD, fc2_EDF))
    # Gradients of vectors are summed in float32. torch's backward of the norm would sum the gradients of its weight and
    # bias in bfloat16, which makes them wrong by 7 to 30 % over 4,000 rows.
    vectors = [torch.zeros_like(widen(w)) for w in (fc1_bias_EF, *norm, weights[-1])]
    dfc1_bias_EF, *dnorm, dfc2_bias_ED = vectors
    [temporary_PF] = new_hidden_buffers(1, x_RD, width, [p for p in pieces if not p.keeps_hidden])
    scratch_buffers = new_hidden_buffers(3, x_RD, width, pieces)
    for piece in pieces:
        e, window, buffer_rows = piece.expert, piece.window, piece.buffer_rows
        x, dout = x_RD[window], dout_RD[window]
        gelu, dnormed, dinner = (t[buffer_rows] for t in scratch_buffers)
        inner_PF = kept_RF[window] if piece.keeps_hidden else temporary_PF[buffer_rows]
        if not piece.keeps_hidden:
            torch.addmm(fc1_bias_EF[e], x, fc1_EFD[e].T, out=inner_PF)
        torch.ops.aten.gelu.out(inner_PF, out=gelu)
        normed = gelu
        if norm:
            norm_F, norm_bias_F = (t[e] for t in norm)
            whitened, mean, rstd = torch.native_layer_norm(gelu, (width,), None, None, eps)
            normed = torch.addcmul(norm_bias_F, whitened, norm_F, out=dinner)
        # The window of a piece, which holds rows of one expert, may reach past the piece. Zeros in these padding rows
        # keep them out of sums over rows. All later gradients follow from dnormed, so they are 0 there, too.
        normed[piece.padding_rows].zero_()
        torch.mm(dout, fc2_EDF[e], out=dnormed)
        dnormed[piece.padding_rows].zero_()
        fc2_sum.add(piece, dout.T, normed)
        dgelu = dnormed
        if norm:
            dgelu = torch.ops.aten.native_layer_norm_backward(
                dnormed, gelu, (width,), mean, rstd, norm_F, norm_bias_F, [True, False, False]
            )[0]
            dnorm[0][e] += whitened.mul_(dnormed).sum(0, dtype=dnorm[0].dtype)
            dnorm[1][e] += dnormed.sum(0, dtype=dnorm[1].dtype)
        torch.ops.aten.gelu_backward.grad_input(dgelu, inner_PF, grad_input=dinner)
        fc1_sum.add(piece, dinner.T, x)
        torch.mm(dinner, fc1_EFD[e], out=dx_RD[window])
        dfc1_bias_EF[e] += dinner.sum(0, dtype=dfc1_bias_EF.dtype)
        dfc2_bias_ED[e] += dout[: piece.rows].sum(0, dtype=dfc1_bias_EF.dtype)
    *inner_vectors, dfc2_bias = (v.to(x_RD.dtype) for v in vectors)
    return [dx_RD, fc1_sum.total_EOI, *inner_vectors, fc2_sum.total_EOI, dfc2_bias]


GELU = SortedKernel(_grouped_gelu_forward, _grouped_gelu_backward)
"""Experts that compute fc2(norm(gelu(fc1(x)))), without the norm if they have no weights for it. Its options are the
norm's `eps` and the share `recompute` of the rows, of which nothing is kept for the backward."""
