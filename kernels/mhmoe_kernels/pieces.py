"""How sorted rows are cut into the pieces that go through an expert at once.

On a CPU a product of a new number of rows costs up to half of its time more: its kernel is compiled for the shape, and
kept among the last 1,024 that were. Experts get other numbers of rows in each step, so these shapes would never end.
So a piece runs on a window of rows that is rounded up, by 3 per cent at most, and reaches into the rows of the next
expert; near the end of all rows, where there is no next one, it is cut in two.
"""

from collections.abc import Iterator
from typing import NamedTuple

PIECE = 1024
"""Rows that go through an expert at a time where the hidden layer is not kept."""

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
    kept: bool
    """Whether their hidden rows are kept from forward to backward."""

    @property
    def window(self) -> slice:
        return slice(self.start, self.start + self.room)


def pieces(counts: list[int], recompute: float, *, rounded: bool) -> list[Piece]:
    """Rows of the experts in order; as whole experts, or where they are recomputed in pieces of `PIECE` rows.

    Args:
        counts: rows per expert.
        recompute: share of all rows, the last ones, that are not kept.
        rounded: whether windows are wider than what is in them, for a CPU's sake.
    """
    return list(_pieces(counts, sum(counts) - round(recompute * sum(counts)), rounded))


def _pieces(counts: list[int], kept: int, rounded: bool) -> Iterator[Piece]:
    total, start = sum(counts), 0
    for expert, count in enumerate(counts):
        begin, end = start, start + count
        while start < end:
            keep = start < kept
            rows = min(end, kept if keep else start + PIECE) - start
            step = max(1, (1 << rows.bit_length() - 1) // STEPS) if rounded else 1
            room = -(-rows // step) * step
            if start + room > total:
                rows = room = rows // step * step
            yield Piece(expert, start, rows, room, start == begin, keep)
            start += rows
