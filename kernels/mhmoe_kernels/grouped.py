"""The kernel `grouped`: sort routes by expert, run each expert once on its contiguous rows, un-sort. It runs on any
device.

Both kinds of experts have a hand-written backward, which keeps less than autograd would, or nothing.

SwiGLU: for each row of an expert, autograd keeps four times F values. Here it is two, gate and up; the rest follows
from them at the cost of a product and a sigmoid. For rows that are recomputed nothing is kept: the backward computes
gate and up again, and the rows go through in pieces small enough for their hidden layer to stay in the cache.

GELU with SubLN: at h heads a row has width d/h and meets h times as many hidden values in all, so passes over the
hidden layer cost more than products. On a CPU, rows go through in pieces whose hidden layer stays in the cache. The
input of the GELU is kept for the backward, one value where autograd keeps three, or nothing for rows that are
recomputed.

A piece runs on its window (`Piece`), which may reach into the rows after it. What it writes there, the piece of those
rows overwrites; zeros keep it out of sums over rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.permutation import combine, permute, plan_routes, wide
from mhmoe_kernels.weights import ExpertWeights, Swiglu

PIECE = 1024
"""Largest number of rows that go through an expert at a time if the hidden layer is not kept or should stay in the
cache."""

CACHE = 4 << 20
"""Bytes of hidden rows that go through at a time if they should stay in a CPU's cache. It is the fastest of 1 to 8 MB
for GELU experts with F/D of 4 and of 60, in float32 and in bfloat16."""

STEPS = 32
"""Number of different window sizes from one power of two to the next."""


class Piece(NamedTuple):
    """Rows of one expert that go through it at the same time."""

    expert: int
    start: int
    rows: int
    room: int
    """Number of rows of the window, at least `rows`."""
    first: bool
    """Whether this is the expert's first piece."""
    last: bool
    """Whether this is the expert's last piece."""
    kept: bool
    """Whether the hidden rows are kept from forward to backward."""

    @property
    def window(self) -> slice:
        return slice(self.start, self.start + self.room)


def pieces(counts: list[int], recompute: float, *, rounded: bool, row_bytes: int = 0) -> list[Piece]:
    """Return the pieces of all experts in order: whole experts where hidden rows are kept, and pieces of at most
    `PIECE` rows where they are recomputed.

    Args:
        counts: number of rows per expert.
        recompute: share of all rows, taken from the end, whose hidden rows are not kept.
        rounded: whether windows are rounded up to few different sizes, which suits a CPU.
        row_bytes: bytes per hidden row; if given, all pieces are limited to the rows that fit into `CACHE`, a limit of
            128 to `PIECE` rows.
    """
    kept = sum(counts) - round(recompute * sum(counts))
    if not row_bytes:
        return list(_pieces(counts, kept, rounded, sum(counts), PIECE))
    rows = min(PIECE, max(128, 1 << (CACHE // row_bytes).bit_length() >> 1))
    return list(_pieces(counts, kept, rounded, rows, rows))


def _pieces(counts: list[int], kept: int, rounded: bool, most_kept: int, most: int) -> Iterator[Piece]:
    total, start = sum(counts), 0
    for expert, count in enumerate(counts):
        begin, end = start, start + count
        while start < end:
            keep = start < kept
            rows = min(end, kept, start + most_kept) - start if keep else min(end, start + most) - start
            step = max(1, (1 << rows.bit_length() - 1) // STEPS) if rounded else 1
            room = -(-rows // step) * step
            if start + room > total:
                rows = room = rows // step * step
            yield Piece(expert, start, rows, room, start == begin, start + rows == end, keep)
            start += rows


def hidden_rows(number: int, x_RD: Tensor, width: int, pieces: list[Piece]) -> list[Tensor]:
    """Return `number` uninitialized buffers that hold the hidden rows of any one of the pieces, in the dtype and on the
    device of x."""
    rows = max((p.room for p in pieces), default=0)
    return [x_RD.new_empty(rows, width) for _ in range(number)]


class SumOfProducts:
    """Accumulator for the weight gradients of each expert, over its pieces in turn.

    With dtypes narrower than float32, each product is rounded once and the products are added in float32.
    """

    def __init__(self, like_EOI: Tensor) -> None:
        """Create an accumulator.

        Args:
            like_EOI: stacked matrices with the shape and dtype of the result.
        """
        self.total_EOI = torch.empty_like(like_EOI)
        """Sums of products; valid for each expert that has a piece, once its last piece is added."""
        narrow = like_EOI.element_size() < 4
        self._wide_OI = like_EOI.new_empty(like_EOI.shape[1:], dtype=torch.float32) if narrow else None

    def add(self, piece: Piece, a_OP: Tensor, b_PI: Tensor) -> None:
        into = self.total_EOI[piece.expert]
        if piece.first and (piece.last or self._wide_OI is None):
            torch.mm(a_OP, b_PI, out=into)
        elif self._wide_OI is None:
            into.addmm_(a_OP, b_PI)
        elif piece.first:
            self._wide_OI.copy_(torch.mm(a_OP, b_PI))
        else:
            self._wide_OI += torch.mm(a_OP, b_PI)
            if piece.last:
                into.copy_(self._wide_OI)


def swiglu_sorted(
    x_RD: Tensor, counts: list[int], gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, recompute: float
) -> Tensor:
    """Return down(silu(gate(x)) * up(x)) of each row's expert.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: number of rows per expert; their sum is R.
        gate_EFD, up_EFD, down_EDF: weights of the E experts.
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


def gelu_sorted(x_RD: Tensor, counts: list[int], weights: tuple[Tensor, ...], eps: float, recompute: float) -> Tensor:
    """Return fc2(norm(gelu(fc1(x)))) of each row's expert.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: number of rows per expert; their sum is R.
        weights: the weights of `GeluSubln`, stacked over experts.
        eps: eps of the norm.
        recompute: share of the rows of which nothing is kept for the backward.
    """
    return _gelu(x_RD, counts, eps, recompute if torch.is_grad_enabled() else 1.0, *weights)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, counts: list[int], eps: float, recompute: float, *weights: Tensor) -> Tensor:
        fc1_EFD, fc1_bias_EF, norm_EF, norm_bias_EF, fc2_EDF, fc2_bias_ED = weights
        width = fc1_EFD.shape[1]
        cpu = x_RD.device.type == "cpu"
        ctx.eps = eps
        ctx.pieces = pieces(counts, recompute, rounded=cpu, row_bytes=width * x_RD.element_size() if cpu else 0)
        kept_RF = x_RD.new_empty(max((p.window.stop for p in ctx.pieces if p.kept), default=0), width)
        [passing_PF] = hidden_rows(1, x_RD, width, [p for p in ctx.pieces if not p.kept])
        [hidden_PF] = hidden_rows(1, x_RD, width, ctx.pieces)
        out_RD = torch.empty_like(x_RD)
        for piece in ctx.pieces:
            e, at, here = piece.expert, piece.window, slice(0, piece.room)
            inner = kept_RF[at] if piece.kept else passing_PF[here]
            torch.addmm(fc1_bias_EF[e], x_RD[at], fc1_EFD[e].T, out=inner)
            gelu = torch.ops.aten.gelu.out(inner, out=hidden_PF[here])
            normed = torch.native_layer_norm(gelu, (width,), norm_EF[e], norm_bias_EF[e], eps)[0]
            torch.addmm(fc2_bias_ED[e], normed, fc2_EDF[e].T, out=out_RD[at])
        ctx.save_for_backward(x_RD, kept_RF, *weights)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, kept_RF, *weights = ctx.saved_tensors
        fc1_EFD, fc1_bias_EF, norm_EF, norm_bias_EF, fc2_EDF, _ = weights
        width = fc1_EFD.shape[1]
        dout_RD = dout_RD.contiguous()
        dx_RD = torch.empty_like(x_RD)
        of_fc1, of_fc2 = SumOfProducts(fc1_EFD), SumOfProducts(fc2_EDF)
        # In float32: the norm's own backward adds these two up in bfloat16, and loses a tenth of them over 4,000 rows.
        vectors = [torch.zeros_like(wide(w)) for w in (fc1_bias_EF, norm_EF, norm_bias_EF, weights[-1])]
        dfc1_bias_EF, dnorm_EF, dnorm_bias_EF, dfc2_bias_ED = vectors
        [passing_PF] = hidden_rows(1, x_RD, width, [p for p in ctx.pieces if not p.kept])
        scratch = hidden_rows(3, x_RD, width, ctx.pieces)
        for piece in ctx.pieces:
            e, at, here, beyond = piece.expert, piece.window, slice(0, piece.room), slice(piece.rows, piece.room)
            x, dout = x_RD[at], dout_RD[at]
            gelu, dnormed, dinner = (t[here] for t in scratch)
            inner = kept_RF[at] if piece.kept else passing_PF[here]
            if not piece.kept:
                torch.addmm(fc1_bias_EF[e], x, fc1_EFD[e].T, out=inner)
            torch.ops.aten.gelu.out(inner, out=gelu)
            whitened, mean, rstd = torch.native_layer_norm(gelu, (width,), None, None, ctx.eps)
            normed = torch.addcmul(norm_bias_EF[e], whitened, norm_EF[e], out=dinner)
            normed[beyond].zero_()
            torch.mm(dout, fc2_EDF[e], out=dnormed)
            dnormed[beyond].zero_()  # and so all that follows from it there
            of_fc2.add(piece, dout.T, normed)
            dgelu = torch.ops.aten.native_layer_norm_backward(
                dnormed, gelu, (width,), mean, rstd, norm_EF[e], norm_bias_EF[e], [True, False, False]
            )[0]
            dnorm_EF[e] += whitened.mul_(dnormed).sum(0, dtype=dnorm_EF.dtype)
            dnorm_bias_EF[e] += dnormed.sum(0, dtype=dnorm_EF.dtype)
            torch.ops.aten.gelu_backward.grad_input(dgelu, inner, grad_input=dinner)
            of_fc1.add(piece, dinner.T, x)
            torch.mm(dinner, fc1_EFD[e], out=dx_RD[at])
            dfc1_bias_EF[e] += dinner.sum(0, dtype=dnorm_EF.dtype)
            dfc2_bias_ED[e] += dout[: piece.rows].sum(0, dtype=dnorm_EF.dtype)
        for idle in set(range(len(fc1_EFD))) - {piece.expert for piece in ctx.pieces}:
            of_fc1.total_EOI[idle].zero_()
            of_fc2.total_EOI[idle].zero_()
        dfc1_bias, dnorm_weight, dnorm_shift, dfc2_bias = (v.to(x_RD.dtype) for v in vectors)
        dfc1, dfc2 = of_fc1.total_EOI, of_fc2.total_EOI
        return dx_RD, None, None, None, dfc1, dfc1_bias, dnorm_weight, dnorm_shift, dfc2, dfc2_bias


_gelu: Callable[..., Tensor] = _GELU.apply


RunSorted = Callable[[Tensor, list[int], ExpertWeights], Tensor]
"""Function from rows sorted by expert, the number of rows per expert, and the experts, to one output row per row."""


def sort_first(
    run_sorted: RunSorted, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Implement `mhmoe_kernels.run_experts` by a function that runs sorted rows through their experts."""
    # `tolist` makes the host wait for a GPU; the loop over experts needs numbers.
    plan = plan_routes(expert_NK, len(weights.stacked[0]))
    return combine(run_sorted(permute(x_ND, plan), plan.count_E.tolist(), weights), gate_NK, plan)


def grouped(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts: see `mhmoe_kernels.run_experts`."""
    return sort_first(run_sorted, x_ND, expert_NK, gate_NK, weights)


def run_sorted(x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through their experts.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: number of rows per expert; their sum is R.
        weights: the experts, len(counts) of them.
    """
    if isinstance(weights.function, Swiglu):
        gate_EFD, up_EFD, down_EDF = weights.stacked
        return swiglu_sorted(x_RD, counts, gate_EFD, up_EFD, down_EDF, weights.recompute)
    return gelu_sorted(x_RD, counts, weights.stacked, weights.function.eps, weights.recompute)
