"""Division of rows that are sorted by expert into pieces, and sums over the pieces of an expert.

A piece is a range of rows of one expert that are computed together. It is computed on a window, which may also have
some rows after the piece. These extra rows belong to later pieces, which overwrite their outputs. Zeros keep the extra
rows out of the sums over the rows of the piece.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PIECE_ROWS = 1024
"""Largest number of rows of a piece, if its hidden layer is recomputed or should stay in the cache."""

CACHE_BYTES = 4 << 20
"""Largest number of bytes of a piece's hidden layer, so that it stays in a CPU's cache.

For GELU experts whose hidden width is 4 or 60 times the width of rows, in float32 and in bfloat16, 4 MiB was the
fastest of the limits from 1 to 8 MB.
"""

WINDOW_STEPS = 32
"""Number of different window sizes (in rows) from one power of two to the next.

A CPU's libraries compile a kernel for each number of rows, so few sizes mean few compilations. With 32, a window has
less than 1/32 (3.1 %) more rows than its piece.
"""


class Piece(NamedTuple):
    """Range of rows of one expert that are computed together, as the first rows of a window that may be longer."""

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
    """True if the hidden activations of the rows are kept from forward to backward."""

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

    A piece has all rows of an expert whose hidden layer is kept, or at most `MAX_PIECE_ROWS` of the rows whose hidden
    layer is recomputed. The last pieces may be shorter, because no window reaches past the last row.

    Args:
        counts: number of rows per expert.
        recompute: share of all rows, from 0 to 1, whose hidden layer is recomputed; these are the last rows.
        round_windows: whether to round windows up to few different sizes, as a CPU needs.
        row_bytes: bytes per hidden row. If this is not 0, all pieces are limited to the rows that fit into
            `CACHE_BYTES`, rounded down to a power of two; this limit lies between 128 and `MAX_PIECE_ROWS`.
    """
    kept_rows = sum(counts) - round(recompute * sum(counts))
    if not row_bytes:
        return list(_iterate_pieces(counts, kept_rows, round_windows, sum(counts), MAX_PIECE_ROWS))
    # A piece has at most as many rows as fit into the cache, rounded down to a power of two, but the limit is at least
    # 128.
    rows = min(MAX_PIECE_ROWS, max(128, 1 << (CACHE_BYTES // row_bytes).bit_length() >> 1))
    return list(_iterate_pieces(counts, kept_rows, round_windows, rows, rows))


def _iterate_pieces(
    counts: list[int], kept_rows: int, round_windows: bool, max_kept_rows: int, max_rows: int
) -> Iterator[Piece]:
    """Yield the pieces that `split_into_pieces` returns.

    Args:
        counts: number of rows per expert.
        kept_rows: number of rows whose hidden layer is kept; these are the first rows.
        round_windows: whether to round windows up to few different sizes.
        max_kept_rows: largest number of rows of a piece whose hidden layer is kept.
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
            # A window (the rows of a piece, rounded up) must not reach past the last of all rows. If it would, the
            # piece is made shorter and another one follows.
            if start + window_rows > total:
                rows = window_rows = rows // step * step
            yield Piece(expert, start, rows, window_rows, start == expert_start, start + rows == expert_end, is_kept)
            start += rows


def new_hidden_buffers(count: int, x_RD: Tensor, width: int, pieces: list[Piece]) -> list[Tensor]:
    """Return `count` uninitialized buffers, each large enough for the hidden activations of any one of the pieces.

    They have the dtype and the device of `x_RD`.
    """
    rows = max((p.window_rows for p in pieces), default=0)
    return [x_RD.new_empty(rows, width) for _ in range(count)]


class GradientAccumulator:
    """Accumulator of the gradients of one matrix of each expert. Pieces must be added in the order of the rows.

    With dtypes narrower than float32, each product is rounded once, and the products are added in float32.
    """

    def __init__(self, like_EOI: Tensor) -> None:
        """Create an accumulator.

        Args:
            like_EOI: stacked matrices with the shape and the dtype of the result.
        """
        self.total_EOI = torch.empty_like(like_EOI)
        """Gradient of each expert's matrix. It is valid once the expert's last piece has been added."""
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


def kept_buffer_rows(rows: int, recompute: float, *, round_windows: bool) -> int:
    """Return the number of rows of a buffer for the windows of all pieces whose hidden layer is kept.

    The result depends only on these arguments, so the shape of a buffer is known before the experts' rows are counted.
    """
    kept_rows = rows - round(recompute * rows)
    return min(rows, kept_rows + kept_rows // WINDOW_STEPS) if round_windows else kept_rows
