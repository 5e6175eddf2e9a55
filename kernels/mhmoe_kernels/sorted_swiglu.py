"""SwiGLU experts over sorted rows, with a backward by hand: it keeps less than autograd would, or nothing.

What autograd keeps of an expert is four tensors of R x F. Here it is two, gate and up; the rest follows from them at
the cost of a product and a sigmoid. With `recompute` it is none: rows go through in pieces small enough that their
hidden layer stays in the cache, and the backward computes gate and up anew.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 1024
"""Rows that go through an expert at a time where the hidden layer is not kept."""


def swiglu_sorted(
    x_RD: Tensor, counts: list[int], gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, recompute: bool
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each row's expert.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: rows per expert, adding up to R.
        gate_EFD, up_EFD, down_EDF: the experts.
        recompute: keep no hidden rows for the backward. In bfloat16 the gradient of an expert's weights is then rounded
            once per `PIECE` rows.
    """
    result: Tensor = _SwiGLU.apply(x_RD, counts, recompute, gate_EFD, up_EFD, down_EDF)  # type: ignore[no-untyped-call]
    return result


def pieces(counts: list[int], size: int | None) -> Iterator[tuple[int, slice, bool]]:
    """Expert, rows, and whether they are its first, of pieces of at most `size` rows; whole experts without one."""
    start = 0
    for expert, count in enumerate(counts):
        for at in range(start, start + count, size or max(count, 1)):
            yield expert, slice(at, min(at + (size or count), start + count)), at == start
        start += count


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, counts: list[int], recompute: bool, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        rows = min(PIECE, len(x_RD)) if recompute else len(x_RD)
        gate_RF, up_RF = (x_RD.new_empty(rows, gate_EFD.shape[1]) for _ in range(2))
        out_RD = torch.empty_like(x_RD)
        for e, at, _ in pieces(counts, PIECE if recompute else None):
            here = slice(0, at.stop - at.start) if recompute else at
            torch.mm(x_RD[at], gate_EFD[e].T, out=gate_RF[here])
            torch.mm(x_RD[at], up_EFD[e].T, out=up_RF[here])
            torch.mm(F.silu(gate_RF[here]).mul_(up_RF[here]), down_EDF[e].T, out=out_RD[at])
        ctx.counts, ctx.recompute = counts, recompute
        kept = () if recompute else (gate_RF, up_RF)
        ctx.save_for_backward(x_RD, gate_EFD, up_EFD, down_EDF, *kept)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_EFD, up_EFD, down_EDF, *kept = ctx.saved_tensors
        dout_RD = dout_RD.contiguous()
        dx_RD = torch.empty_like(x_RD)
        dgate_EFD, dup_EFD, ddown_EDF = (torch.zeros_like(w) for w in (gate_EFD, up_EFD, down_EDF))
        rows = max((at.stop - at.start for _, at, _ in pieces(ctx.counts, PIECE if ctx.recompute else None)), default=0)
        own = [x_RD.new_empty(rows, gate_EFD.shape[1]) for _ in range(3 + 2 * ctx.recompute)]
        for e, at, first in pieces(ctx.counts, PIECE if ctx.recompute else None):
            x, dout, here = x_RD[at], dout_RD[at], slice(0, at.stop - at.start)
            hidden, dhidden, silu = (buffer[here] for buffer in own[:3])
            gate, up = (t[at] for t in kept) if kept else (buffer[here] for buffer in own[3:])
            if ctx.recompute:
                torch.mm(x, gate_EFD[e].T, out=gate)
                torch.mm(x, up_EFD[e].T, out=up)
            torch.ops.aten.silu.out(gate, out=silu)
            torch.mul(silu, up, out=hidden)
            torch.mm(dout, down_EDF[e], out=dhidden)
            _add_product(ddown_EDF[e], dout.T, hidden, first)
            dup = silu.mul_(dhidden)
            dgate = torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=hidden)
            _add_product(dup_EFD[e], dup.T, x, first)
            _add_product(dgate_EFD[e], dgate.T, x, first)
            torch.mm(dgate, gate_EFD[e], out=dx_RD[at])
            dx_RD[at].addmm_(dup, up_EFD[e])
        return dx_RD, None, None, dgate_EFD, dup_EFD, ddown_EDF


def _add_product(into: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    if first:
        torch.mm(a, b, out=into)
    else:
        into.addmm_(a, b)
