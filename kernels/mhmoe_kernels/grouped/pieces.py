"""Division of rows that are sorted by expert into pieces, and sums over the pieces of an expert.

A piece is a range of rows of one expert that are computed together. Its window may have rows of later pieces after it;
these overwrite their outputs, and zeros keep the rows out of the piece's sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_PIECE_ROWS = 1024
"""Largest rows of a piece that is recomputed or should stay in the cache."""

CACHE_BYTES = 4 << 20
"""Largest bytes of a piece's hidden layer, so that it stays in a CPU's cache. Of the limits from 1 to 8 MB, 4 MiB was
the fastest for GELU experts whose hidden width is 4 or 60 times the row width, in float32 and bfloat16."""

WINDOW_STEPS = 32
"""Number of window sizes (in rows) from one power of two to the next. A CPU's libraries compile a kernel for each
number of rows. With 32, a window has less than 1/32 (3.1 %) more rows than its piece."""


class Piece(NamedTuple):
    """Range of rows of one expert, the first rows of a window."""

    expert: int
    start: int
    rows: int
    window_rows: int
    """Rows of the window, at least `rows`; it also begins at `start`."""
    is_first: bool
    """True for the expert's first piece."""
    is_last: bool
    """True for the expert's last piece."""
    keeps_hidden: bool
    """True if the hidden activations are kept for the backward."""

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
    """Split rows that are sorted by expert into pieces, in order.

    A piece has all rows of an expert whose hidden layer is kept, or at most `MAX_PIECE_ROWS` recomputed ones, which are
    the last share `recompute` of all rows. No window reaches past the last row, so the last pieces may be shorter.
    `round_windows` rounds windows up to few sizes, as a CPU needs. With `row_bytes` per hidden row, every piece is
    limited to the rows that fit into `CACHE_BYTES`, rounded down to a power of two, from 128 to `MAX_PIECE_ROWS`.
    """
    total = sum(counts)
    kept_rows = total - round(recompute * total)
    max_kept_rows, max_rows = total, MAX_PIECE_ROWS
    if row_bytes:
        max_kept_rows = max_rows = min(MAX_PIECE_ROWS, max(128, 1 << (CACHE_BYTES // row_bytes).bit_length() >> 1))
    pieces, start = list[Piece](), 0
    for expert, count in enumerate(counts):
        expert_start, expert_end = start, start + count
        while start < expert_end:
            is_kept = start < kept_rows
            end = min(expert_end, kept_rows, start + max_kept_rows) if is_kept else min(expert_end, start + max_rows)
            rows = end - start
            step = max(1, (1 << rows.bit_length() - 1) // WINDOW_STEPS) if round_windows else 1
            window_rows = -(-rows // step) * step
            # A window (the rows of a piece, rounded up) must not reach past the last of all rows. If it would, the
            # piece is made shorter and another one follows.
            if start + window_rows > total:
                rows = window_rows = rows // step * step
            pieces.append(
                Piece(expert, start, rows, window_rows, start == expert_start, start + rows == expert_end, is_kept)
            )
            start += rows
    return pieces


def new_hidden_buffers(count: int, x_RD: Tensor, width: int, pieces: list[Piece]) -> list[Tensor]:
    """Return uninitialized buffers like `x_RD`, each large enough for the hidden activations of any piece."""
    rows = max((p.window_rows for p in pieces), default=0)
    return [x_RD.new_empty(rows, width) for _ in range(count)]


class GradientAccumulator:
    """Accumulator of the gradients of one matrix of each expert. Pieces must be added in the order of the rows.

    Products narrower than float32 are rounded once and added in float32.
    """

    def __init__(self, like_EOI: Tensor, pieces: list[Piece]) -> None:
        self.total_EOI = torch.empty_like(like_EOI)
        """Gradients: 0 for an expert without pieces, and otherwise valid once its last piece has been added."""
        for idle_expert in set(range(len(like_EOI))) - {piece.expert for piece in pieces}:
            self.total_EOI[idle_expert].zero_()
        # Sums of bfloat16 gradients need a float32 buffer: with 8 bits of precision, a sum of ones would stop growing
        # at 256.
        is_narrow = like_EOI.element_size() < 4
        self._wide_OI = like_EOI.new_empty(like_EOI.shape[1:], dtype=torch.float32) if is_narrow else None

    def add(self, piece: Piece, a_OP: Tensor, b_PI: Tensor) -> None:
        """Add `a_OP` @ `b_PI` to the sum of the piece's expert."""
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
    """Return the rows of a buffer for all windows whose hidden layer is kept.

    The shape of a buffer is thus known before the experts' rows are counted.
    """
    kept_rows = rows - round(recompute * rows)
    return min(rows, kept_rows + kept_rows // WINDOW_STEPS) if round_windows else kept_rows
