"""How sorted rows are cut into the pieces that go through an expert at once.

On a CPU a product of a new number of rows costs up to half of its time more: its kernel is compiled for the shape, and
kept among the last 1,024 that were. Experts get other numbers of rows in each step, so these shapes would never end.
So a piece runs on a window of rows that is rounded up, by 3 per cent at most, and reaches into the rows of the next
expert; near the end of all rows, where there is no next one, it is cut in two. What is not finite in those rows reaches
this expert's gradients too, as zero times it is not zero: they are lost together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 1024
"""Rows that go through an expert at a time, at most, where the hidden layer is not kept or is to stay in the cache."""

CACHE = 4 << 20
"""Bytes of hidden rows that go through at a time where they shall stay in a CPU's cache. Of 1 to 8 MB the fastest for
GELU experts with F/D of 4 and of 60, in float32 and in bfloat16."""

STEPS = 32
"""Numbers of rows that a window may have from one power of two to the next."""


class Piece(NamedTuple):
    """Rows of one expert that go through it at once."""

    expert: int
    start: int
    rows: int
    room: int
    """Rows of the window, at least `rows`."""
    first: bool
    """Whether none of this expert came before."""
    last: bool
    """Whether none of it comes after."""
    kept: bool
    """Whether their hidden rows are kept from forward to backward."""

    @property
    def window(self) -> slice:
        return slice(self.start, self.start + self.room)


def pieces(counts: list[int], recompute: float, *, rounded: bool, row_bytes: int = 0) -> list[Piece]:
    """Rows of the experts in order; as whole experts, or where they are recomputed in pieces of `PIECE` rows.

    Args:
        counts: rows per expert.
        recompute: share of all rows, the last ones, that are not kept.
        rounded: whether windows are wider than what is in them, for a CPU's sake.
        row_bytes: of a hidden row, where all pieces shall be small enough for `CACHE`.
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
    """Room for the hidden rows of any one of the pieces, of x's dtype and device."""
    rows = max((p.room for p in pieces), default=0)
    return [x_RD.new_empty(rows, width) for _ in range(number)]


class SumOfProducts:
    """Of the pieces of each expert in turn. Narrow numbers: products are rounded once each, and add up in float32."""

    def __init__(self, like_EOI: Tensor) -> None:
        """Args:
        like_EOI: of whose shape and dtype it is.
        """
        self.total_EOI = torch.empty_like(like_EOI)
        """Of experts that have a piece, once their last one was added."""
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
