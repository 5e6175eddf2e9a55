"""SwiGLU experts; each expert runs on its own contiguous rows.

For each row of an expert, autograd would keep 4 F values for the backward. This code keeps 2 F, gate and up, and for
recomputed rows none. These are computed in pieces whose hidden layer stays in the cache.
"""

import torch
from torch import Tensor

from mhmoe_kernels.grouped.autograd import SortedKernel, empty_gradients
from mhmoe_kernels.grouped.pieces import GradientAccumulator, kept_buffer_rows, new_hidden_buffers, split_into_pieces
from mhmoe_kernels.operators import compiled_operator


def _new_results(x_RD: Tensor, count_E: Tensor, recompute: float, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    rows = kept_buffer_rows(len(x_RD), recompute, round_windows=x_RD.device.type == "cpu")
    return torch.empty_like(x_RD), [x_RD.new_empty(rows, weights[0].shape[1]) for _ in range(2)]


@compiled_operator(fake=_new_results)
def _grouped_swiglu_forward(
    x_RD: Tensor, count_E: Tensor, recompute: float, weights: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the experts' outputs, and the kept outputs of gate and up."""
    gate_EFD, up_EFD, down_EDF = weights
    pieces = split_into_pieces(count_E.tolist(), recompute, round_windows=x_RD.device.type == "cpu")
    width = gate_EFD.shape[1]
    out_RD, kept_buffers = _new_results(x_RD, count_E, recompute, weights)
    temporary_buffers = new_hidden_buffers(2, x_RD, width, [p for p in pieces if not p.keeps_hidden])
    [hidden_PF] = new_hidden_buffers(1, x_RD, width, pieces)
    for piece in pieces:
        e, window, buffer_rows = piece.expert, piece.window, piece.buffer_rows
        gate_PF, up_PF = (
            (t[window] for t in kept_buffers) if piece.keeps_hidden else (t[buffer_rows] for t in temporary_buffers)
        )
        torch.mm(x_RD[window], gate_EFD[e].T, out=gate_PF)
        torch.mm(x_RD[window], up_EFD[e].T, out=up_PF)
        hidden = torch.ops.aten.silu.out(gate_PF, out=hidden_PF[buffer_rows]).mul_(up_PF)
        torch.mm(hidden, down_EDF[e].T, out=out_RD[window])
    return out_RD, kept_buffers


@compiled_operator(fake=empty_gradients)
def _grouped_swiglu_backward(
    dout_RD: Tensor, count_E: Tensor, recompute: float, x_RD: Tensor, weights: list[Tensor], kept_buffers: list[Tensor]
) -> list[Tensor]:
    """Return the gradients of rows and weights."""
    gate_EFD, up_EFD, down_EDF = weights
    pieces = split_into_pieces(count_E.tolist(), recompute, round_windows=x_RD.device.type == "cpu")
    dout_RD = dout_RD.contiguous()
    dx_RD = torch.empty_like(x_RD)
    accumulators = [GradientAccumulator(w, pieces) for w in weights]
    gate_sum, up_sum, down_sum = accumulators
    width = gate_EFD.shape[1]
    temporary_buffers = new_hidden_buffers(2, x_RD, width, [p for p in pieces if not p.keeps_hidden])
    scratch_buffers = new_hidden_buffers(3, x_RD, width, pieces)
    for piece in pieces:
        e, window, buffer_rows = piece.expert, piece.window, piece.buffer_rows
        x, dout = x_RD[window], dout_RD[window]
        hidden, dhidden, silu = (t[buffer_rows] for t in scratch_buffers)
        gate_PF, up_PF = (
            (t[window] for t in kept_buffers) if piece.keeps_hidden else (t[buffer_rows] for t in temporary_buffers)
        )
        if not piece.keeps_hidden:
            torch.mm(x, gate_EFD[e].T, out=gate_PF)
            torch.mm(x, up_EFD[e].T, out=up_PF)
        torch.ops.aten.silu.out(gate_PF, out=silu)
        torch.mul(silu, up_PF, out=hidden)
        # The window of a piece may reach past the piece, into rows of other experts or pieces. Zeros in these padding
        # rows keep them out of the weight gradients. dup and dgate are products with dhidden, so they are 0 there, too.
        hidden[piece.padding_rows].zero_()
        torch.mm(dout, down_EDF[e], out=dhidden)
        dhidden[piece.padding_rows].zero_()
        down_sum.add(piece, dout.T, hidden)
        dup = silu.mul_(dhidden)
        dgate = torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up_PF), gate_PF, grad_input=hidden)
        up_sum.add(piece, dup.T, x)
        gate_sum.add(piece, dgate.T, x)
        torch.mm(dgate, gate_EFD[e], out=dx_RD[window])
        dx_RD[window].addmm_(dup, up_EFD[e])
    return [dx_RD, *(accumulator.total_EOI for accumulator in accumulators)]


SWIGLU = SortedKernel(_grouped_swiglu_forward, _grouped_swiglu_backward)
"""Experts that compute down(silu(gate(x)) * up(x)). Its option is the share `recompute` of the rows, whose hidden layer
is not kept for the backward."""
