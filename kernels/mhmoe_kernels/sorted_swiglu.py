"""SwiGLU experts over sorted rows, with a backward by hand: it keeps less than autograd would, or nothing.

What autograd keeps of a row in an expert is four times F values. Here it is two, gate and up; the rest follows from
them at the cost of a product and a sigmoid. Of rows that are recomputed it is none: the backward computes gate and up
anew, and they go through in pieces small enough that their hidden layer stays in the cache.

A piece runs on its window (pieces.py), which may reach into the rows after it. What it writes there, the piece of those
rows writes again; from sums over rows they are kept out by zeros.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.pieces import SumOfProducts, hidden_rows, pieces


def swiglu_sorted(
    x_RD: Tensor, counts: list[int], gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, recompute: float
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each row's expert.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: rows per expert, adding up to R.
        gate_EFD, up_EFD, down_EDF: the experts.
        recompute: share of the rows whose hidden layer is not kept for the backward.
    """
    return _swiglu(x_RD, counts, recompute if torch.is_grad_enabled() else 1.0, gate_EFD, up_EFD, down_EDF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, counts: list[int], recompute: float, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        ctx.pieces = pieces(counts, recompute, rounded=x_RD.device.type == "cpu")
        width = gate_EFD.shape[1]
        kept_rows = max((p.window.stop for p in ctx.pieces if p.kept), default=0)
        kept = [x_RD.new_empty(kept_rows, width) for _ in range(2)]
        passing = hidden_rows(2, x_RD, width, [p for p in ctx.pieces if not p.kept])
        [hidden_PF] = hidden_rows(1, x_RD, width, ctx.pieces)
        out_RD = torch.empty_like(x_RD)
        for piece in ctx.pieces:
            e, at, here = piece.expert, piece.window, slice(0, piece.room)
            gate, up = (t[at] for t in kept) if piece.kept else (t[here] for t in passing)
            torch.mm(x_RD[at], gate_EFD[e].T, out=gate)
            torch.mm(x_RD[at], up_EFD[e].T, out=up)
            hidden = torch.ops.aten.silu.out(gate, out=hidden_PF[here]).mul_(up)
            torch.mm(hidden, down_EDF[e].T, out=out_RD[at])
        ctx.save_for_backward(x_RD, gate_EFD, up_EFD, down_EDF, *kept)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_EFD, up_EFD, down_EDF, *kept = ctx.saved_tensors
        dout_RD = dout_RD.contiguous()
        dx_RD = torch.empty_like(x_RD)
        sums = [SumOfProducts(w) for w in (gate_EFD, up_EFD, down_EDF)]
        of_gate, of_up, of_down = sums
        width = gate_EFD.shape[1]
        passing = hidden_rows(2, x_RD, width, [p for p in ctx.pieces if not p.kept])
        scratch = hidden_rows(3, x_RD, width, ctx.pieces)
        for piece in ctx.pieces:
            e, at, here, beyond = piece.expert, piece.window, slice(0, piece.room), slice(piece.rows, piece.room)
            x, dout = x_RD[at], dout_RD[at]
            hidden, dhidden, silu = (t[here] for t in scratch)
            gate, up = (t[at] for t in kept) if piece.kept else (t[here] for t in passing)
            if not piece.kept:
                torch.mm(x, gate_EFD[e].T, out=gate)
                torch.mm(x, up_EFD[e].T, out=up)
            torch.ops.aten.silu.out(gate, out=silu)
            torch.mul(silu, up, out=hidden)
            hidden[beyond].zero_()
            torch.mm(dout, down_EDF[e], out=dhidden)
            dhidden[beyond].zero_()  # and so dup and dgate there
            of_down.add(piece, dout.T, hidden)
            dup = silu.mul_(dhidden)
            dgate = torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=hidden)
            of_up.add(piece, dup.T, x)
            of_gate.add(piece, dgate.T, x)
            torch.mm(dgate, gate_EFD[e], out=dx_RD[at])
            dx_RD[at].addmm_(dup, up_EFD[e])
        gradients = [s.total_EOI for s in sums]
        for idle in set(range(len(gate_EFD))) - {piece.expert for piece in ctx.pieces}:
            for gradient in gradients:
                gradient[idle].zero_()
        return dx_RD, None, None, *gradients


_swiglu: Callable[[Tensor, list[int], float, Tensor, Tensor, Tensor], Tensor] = _SwiGLU.apply
