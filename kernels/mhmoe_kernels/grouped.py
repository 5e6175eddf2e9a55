"""Kernel `grouped`: it sorts routes by expert, runs each expert once on its contiguous rows, and restores the order.

It runs on any device. Both kinds of experts have a hand-written backward, which keeps less than autograd, or nothing.

SwiGLU: for each row of an expert, autograd keeps four times F values. This backward keeps twice F, gate and up, and
computes the rest from them with a product and a sigmoid. For recomputed rows it keeps nothing: the backward computes
gate and up again, and the rows pass in pieces that are small enough for their hidden layer to stay in the cache.

GELU with SubLN: with h heads a row has width d/h, and there are h times as many hidden values in all, so passes over
the hidden layer cost more than products. On a CPU, rows therefore pass in pieces whose hidden layer stays in the cache.
The backward keeps the input of the GELU, one value where autograd keeps three, or nothing for recomputed rows.

A piece runs on its window (`Piece`), which may reach into the rows after the piece. Those rows' own piece runs later
and overwrites the outputs there. Zeros keep those rows out of sums over rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.permutation import combine, permute, plan_routes, widen
from mhmoe_kernels.weights import ExpertWeights, Swiglu

MAX_PIECE_ROWS = 1024
"""Largest number of rows of a piece whose hidden layer is not kept, or should stay in the cache."""

CACHE_BYTES = 4 << 20
"""Bytes of a piece's hidden rows that should stay in a CPU's cache.

4 MiB was the fastest of 1 to 8 MB for GELU experts with F/D of 4 and of 60, in float32 and in bfloat16.
"""

WINDOW_STEPS = 32
"""Number of different window sizes from one power of two to the next.

A CPU's libraries compile a kernel for each number of rows, so few sizes mean few compilations. With 32, a window has
less than 1/32 (3.1 %) more rows than its piece.
"""


class Piece(NamedTuple):
    """Range of rows of one expert that pass through it at the same time, as part of a window that may be longer."""

    expert: int
    start: int
    rows: int
    window_rows: int
    """Number of rows of the window, at least `rows`; the window, too, begins at `start`."""
    is_first: bool
    """True for the first piece of the expert."""
    is_last: bool
    """True for the last piece of the expert."""
    keeps_hidden: bool
    """True if the hidden rows are kept from forward to backward."""

    @property
    def window(self) -> slice:
        return slice(self.start, self.start + self.window_rows)

    @property
    def buffer_rows(self) -> slice:
        """Rows of a buffer that hold the window."""
        return slice(0, self.window_rows)

    @property
    def padding_rows(self) -> slice:
        """Rows of a buffer that belong to the window but not to the piece."""
        return slice(self.rows, self.window_rows)


def split_into_pieces(counts: list[int], recompute: float, *, round_windows: bool, row_bytes: int = 0) -> list[Piece]:
    """Split rows that are sorted by expert into pieces, and return the pieces in order.

    A piece has all rows of an expert whose hidden rows are kept, or at most `MAX_PIECE_ROWS` of those whose hidden rows
    are recomputed. The last pieces may be shorter, because no window reaches past the last row.

    Args:
        counts: number of rows per expert.
        recompute: share of all rows, at the end, whose hidden rows are not kept.
        round_windows: whether to round windows up to few different sizes, as a CPU needs.
        row_bytes: bytes per hidden row. If this is not 0, all pieces are limited to the rows that fit into
            `CACHE_BYTES`, rounded down to a power of two; this limit lies between 128 and `MAX_PIECE_ROWS`.
    """
    kept_rows = sum(counts) - round(recompute * sum(counts))
    if not row_bytes:
        return list(_iterate_pieces(counts, kept_rows, round_windows, sum(counts), MAX_PIECE_ROWS))
    # The limit of a piece is the largest power of two of rows that fit into the cache.
    rows = min(MAX_PIECE_ROWS, max(128, 1 << (CACHE_BYTES // row_bytes).bit_length() >> 1))
    return list(_iterate_pieces(counts, kept_rows, round_windows, rows, rows))


def _iterate_pieces(
    counts: list[int], kept_rows: int, round_windows: bool, max_kept_rows: int, max_rows: int
) -> Iterator[Piece]:
    """Yield pieces as `split_into_pieces` returns them.

    Args:
        counts: number of rows per expert.
        kept_rows: number of rows at the start whose hidden rows are kept.
        round_windows: whether to round windows up to few different sizes.
        max_kept_rows: largest number of rows of a piece whose hidden rows are kept.
        max_rows: largest number of rows of any other piece.
    """
    total, start = sum(counts), 0
    for expert, count in enumerate(counts):
        expert_start, expert_end = start, start + count
        while start < expert_end:
            is_kept = start < kept_rows
            rows = (
                min(expert_end, kept_rows, start + max_kept_rows) - start
                if is_kept
                else min(expert_end, start + max_rows) - start
            )
            step = max(1, (1 << rows.bit_length() - 1) // WINDOW_STEPS) if round_windows else 1
            window_rows = -(-rows // step) * step
            # No window may reach past the last of all rows. If this one would, the piece is made shorter and another
            # one follows.
            if start + window_rows > total:
                rows = window_rows = rows // step * step
            yield Piece(expert, start, rows, window_rows, start == expert_start, start + rows == expert_end, is_kept)
            start += rows


def new_hidden_buffers(count: int, x_RD: Tensor, width: int, pieces: list[Piece]) -> list[Tensor]:
    """Return `count` uninitialized buffers, each large enough for the hidden rows of any of the pieces.

    They have the dtype and the device of `x_RD`.
    """
    rows = max((p.window_rows for p in pieces), default=0)
    return [x_RD.new_empty(rows, width) for _ in range(count)]


class GradientAccumulator:
    """Accumulator of the gradients of one matrix of each expert. All pieces must be added in order.

    With dtypes narrower than float32, each product is rounded once, and the products are added in float32.
    """

    def __init__(self, like_EOI: Tensor) -> None:
        """Create an accumulator.

        Args:
            like_EOI: stacked matrices with the shape and the dtype of the result.
        """
        self.total_EOI = torch.empty_like(like_EOI)
        """Sums of products. An expert's sum is valid once its last piece is added."""
        # Sums of bfloat16 gradients need a float32 buffer: with 8 bits of precision, a sum of ones would stop growing
        # at 256.
        is_narrow = like_EOI.element_size() < 4
        self._wide_OI = like_EOI.new_empty(like_EOI.shape[1:], dtype=torch.float32) if is_narrow else None

    def add(self, piece: Piece, a_OP: Tensor, b_PI: Tensor) -> None:
        """Add the product `a_OP` @ `b_PI` to the sum of the piece's expert."""
        total_OI = self.total_EOI[piece.expert]
        if piece.is_first and (piece.is_last or self._wide_OI is None):
            torch.mm(a_OP, b_PI, out=total_OI)
        elif self._wide_OI is None:
            total_OI.addmm_(a_OP, b_PI)
        elif piece.is_first:
            self._wide_OI.copy_(torch.mm(a_OP, b_PI))
        else:
            self._wide_OI += torch.mm(a_OP, b_PI)
            if piece.is_last:
                total_OI.copy_(self._wide_OI)


def swiglu_sorted(
    x_RD: Tensor, counts: list[int], gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, recompute: float
) -> Tensor:
    """Return down(silu(gate(x)) * up(x)) with the expert of each row.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: number of rows per expert; their sum is R.
        gate_EFD, up_EFD, down_EDF: weights of the E experts.
        recompute: share of the rows whose hidden layer is not kept for the backward.
    """
    # If gradients are disabled, there is no backward, so the share is 1.0 and no hidden rows are kept.
    return _swiglu(x_RD, counts, recompute if torch.is_grad_enabled() else 1.0, gate_EFD, up_EFD, down_EDF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, counts: list[int], recompute: float, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        ctx.pieces = split_into_pieces(counts, recompute, round_windows=x_RD.device.type == "cpu")
        width = gate_EFD.shape[1]
        kept_rows = max((p.window.stop for p in ctx.pieces if p.keeps_hidden), default=0)
        kept_buffers = [x_RD.new_empty(kept_rows, width) for _ in range(2)]
        temporary_buffers = new_hidden_buffers(2, x_RD, width, [p for p in ctx.pieces if not p.keeps_hidden])
        [hidden_PF] = new_hidden_buffers(1, x_RD, width, ctx.pieces)
        out_RD = torch.empty_like(x_RD)
        for piece in ctx.pieces:
            e, window, buffer_rows = piece.expert, piece.window, piece.buffer_rows
            gate_PF, up_PF = (
                (t[window] for t in kept_buffers) if piece.keeps_hidden else (t[buffer_rows] for t in temporary_buffers)
            )
            torch.mm(x_RD[window], gate_EFD[e].T, out=gate_PF)
            torch.mm(x_RD[window], up_EFD[e].T, out=up_PF)
            hidden = torch.ops.aten.silu.out(gate_PF, out=hidden_PF[buffer_rows]).mul_(up_PF)
            torch.mm(hidden, down_EDF[e].T, out=out_RD[window])
        ctx.save_for_backward(x_RD, gate_EFD, up_EFD, down_EDF, *kept_buffers)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_EFD, up_EFD, down_EDF, *kept_buffers = ctx.saved_tensors
        dout_RD = dout_RD.contiguous()
        dx_RD = torch.empty_like(x_RD)
        accumulators = [GradientAccumulator(w) for w in (gate_EFD, up_EFD, down_EDF)]
        gate_sum, up_sum, down_sum = accumulators
        width = gate_EFD.shape[1]
        temporary_buffers = new_hidden_buffers(2, x_RD, width, [p for p in ctx.pieces if not p.keeps_hidden])
        scratch_buffers = new_hidden_buffers(3, x_RD, width, ctx.pieces)
        for piece in ctx.pieces:
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
            # The window's rows past the piece belong to another expert or piece. Zeros there keep them out of the
            # weight gradients; dup and dgate are products with dhidden and so are 0 there, too.
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
        # Experts without rows have no piece, so their gradients are still uninitialized and are set to 0 here.
        gradients = [s.total_EOI for s in accumulators]
        for idle_expert in set(range(len(gate_EFD))) - {piece.expert for piece in ctx.pieces}:
            for gradient in gradients:
                gradient[idle_expert].zero_()
        return dx_RD, None, None, *gradients


_swiglu: Callable[[Tensor, list[int], float, Tensor, Tensor, Tensor], Tensor] = _SwiGLU.apply


def gelu_sorted(x_RD: Tensor, counts: list[int], weights: tuple[Tensor, ...], eps: float, recompute: float) -> Tensor:
    """Return fc2(norm(gelu(fc1(x)))) with the expert of each row.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: number of rows per expert; their sum is R.
        weights: the weights of `GeluSubln`, stacked over experts.
        eps: value added to the variance in the norm.
        recompute: share of the rows for which nothing is kept for the backward.
    """
    # If gradients are disabled, there is no backward, so the share is 1.0 and no hidden rows are kept.
    return _gelu(x_RD, counts, eps, recompute if torch.is_grad_enabled() else 1.0, *weights)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, counts: list[int], eps: float, recompute: float, *weights: Tensor) -> Tensor:
        fc1_EFD, fc1_bias_EF, norm_EF, norm_bias_EF, fc2_EDF, fc2_bias_ED = weights
        width = fc1_EFD.shape[1]
        is_cpu = x_RD.device.type == "cpu"
        ctx.eps = eps
        ctx.pieces = split_into_pieces(
            counts, recompute, round_windows=is_cpu, row_bytes=width * x_RD.element_size() if is_cpu else 0
        )
        kept_RF = x_RD.new_empty(max((p.window.stop for p in ctx.pieces if p.keeps_hidden), default=0), width)
        [temporary_PF] = new_hidden_buffers(1, x_RD, width, [p for p in ctx.pieces if not p.keeps_hidden])
        [hidden_PF] = new_hidden_buffers(1, x_RD, width, ctx.pieces)
        out_RD = torch.empty_like(x_RD)
        for piece in ctx.pieces:
            e, window, buffer_rows = piece.expert, piece.window, piece.buffer_rows
            inner_PF = kept_RF[window] if piece.keeps_hidden else temporary_PF[buffer_rows]
            torch.addmm(fc1_bias_EF[e], x_RD[window], fc1_EFD[e].T, out=inner_PF)
            gelu = torch.ops.aten.gelu.out(inner_PF, out=hidden_PF[buffer_rows])
            normed = torch.native_layer_norm(gelu, (width,), norm_EF[e], norm_bias_EF[e], eps)[0]
            torch.addmm(fc2_bias_ED[e], normed, fc2_EDF[e].T, out=out_RD[window])
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
        fc1_sum, fc2_sum = GradientAccumulator(fc1_EFD), GradientAccumulator(fc2_EDF)
        # Gradients of vectors are summed in float32. The norm's own backward would sum the gradients of its weight and
        # bias in bfloat16, which makes them wrong by 7 to 30 % over 4,000 rows.
        vectors = [torch.zeros_like(widen(w)) for w in (fc1_bias_EF, norm_EF, norm_bias_EF, weights[-1])]
        dfc1_bias_EF, dnorm_EF, dnorm_bias_EF, dfc2_bias_ED = vectors
        [temporary_PF] = new_hidden_buffers(1, x_RD, width, [p for p in ctx.pieces if not p.keeps_hidden])
        scratch_buffers = new_hidden_buffers(3, x_RD, width, ctx.pieces)
        for piece in ctx.pieces:
            e, window, buffer_rows = piece.expert, piece.window, piece.buffer_rows
            x, dout = x_RD[window], dout_RD[window]
            gelu, dnormed, dinner = (t[buffer_rows] for t in scratch_buffers)
            inner_PF = kept_RF[window] if piece.keeps_hidden else temporary_PF[buffer_rows]
            if not piece.keeps_hidden:
                torch.addmm(fc1_bias_EF[e], x, fc1_EFD[e].T, out=inner_PF)
            torch.ops.aten.gelu.out(inner_PF, out=gelu)
            whitened, mean, rstd = torch.native_layer_norm(gelu, (width,), None, None, ctx.eps)
            normed = torch.addcmul(norm_bias_EF[e], whitened, norm_EF[e], out=dinner)
            # Zeros keep the rows past the piece out of sums over rows. All later gradients follow from dnormed, so they
            # are 0 there, too.
            normed[piece.padding_rows].zero_()
            torch.mm(dout, fc2_EDF[e], out=dnormed)
            dnormed[piece.padding_rows].zero_()
            fc2_sum.add(piece, dout.T, normed)
            dgelu = torch.ops.aten.native_layer_norm_backward(
                dnormed, gelu, (width,), mean, rstd, norm_EF[e], norm_bias_EF[e], [True, False, False]
            )[0]
            dnorm_EF[e] += whitened.mul_(dnormed).sum(0, dtype=dnorm_EF.dtype)
            dnorm_bias_EF[e] += dnormed.sum(0, dtype=dnorm_EF.dtype)
            torch.ops.aten.gelu_backward.grad_input(dgelu, inner_PF, grad_input=dinner)
            fc1_sum.add(piece, dinner.T, x)
            torch.mm(dinner, fc1_EFD[e], out=dx_RD[window])
            dfc1_bias_EF[e] += dinner.sum(0, dtype=dnorm_EF.dtype)
            dfc2_bias_ED[e] += dout[: piece.rows].sum(0, dtype=dnorm_EF.dtype)
        # Experts without rows have no piece, so their gradients are still uninitialized and are set to 0 here.
        for idle_expert in set(range(len(fc1_EFD))) - {piece.expert for piece in ctx.pieces}:
            fc1_sum.total_EOI[idle_expert].zero_()
            fc2_sum.total_EOI[idle_expert].zero_()
        dfc1_bias, dnorm_weight, dnorm_shift, dfc2_bias = (v.to(x_RD.dtype) for v in vectors)
        dfc1, dfc2 = fc1_sum.total_EOI, fc2_sum.total_EOI
        return dx_RD, None, None, None, dfc1, dfc1_bias, dnorm_weight, dnorm_shift, dfc2, dfc2_bias


_gelu: Callable[..., Tensor] = _GELU.apply


RunSorted = Callable[[Tensor, list[int], ExpertWeights], Tensor]
"""Function (x_RD, counts, weights) -> y_RD of rows that are sorted by expert; `run_sorted` describes the arguments."""


def sort_and_run(
    run_sorted: RunSorted, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Sort routed rows by expert, run them through their experts with `run_sorted`, and combine the outputs per row.

    Arguments and result are those of `mhmoe_kernels.run_experts`.
    """
    # `tolist` makes the host wait for a GPU, but the loop over experts needs the counts on the host.
    plan = plan_routes(expert_NK, len(weights.stacked[0]))
    return combine(run_sorted(permute(x_ND, plan), plan.count_E.tolist(), weights), gate_NK, plan)


def run_grouped(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts, as `mhmoe_kernels.run_experts` does."""
    return sort_and_run(run_sorted, x_ND, expert_NK, gate_NK, weights)


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
