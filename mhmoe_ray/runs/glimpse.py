"""Looks into a file of JSON lines (jsonl.py) here and there: a long one takes no longer than a short one."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from mhmoe_ray.runs.jsonl import parts_with_sizes, records
from mhmoe_ray.storage import Location

BLOCK = 1 << 16
PROBE = 1 << 12


class Glimpse:
    """The file as it is when this is made; torn lines are passed over."""

    def __init__(self, path: Location) -> None:
        self._parts, sizes = [], []
        for part, size in parts_with_sizes(path):
            self._parts.append(part)
            sizes.append(size)
        self._ends = list(accumulate(sizes))
        self.size = self._ends[-1] if self._ends else 0
        """Bytes."""

    def backwards(self) -> Iterator[dict[str, Any]]:
        """All lines, the last one first."""
        end, rest = self.size, b""
        for index in reversed(range(len(self._parts))):
            begin = self._begin(index)
            while end > begin:
                block = self._read(index, max(begin, end - BLOCK), end)
                end -= len(block)
                rest, *lines = (block + rest).split(b"\n")
                yield from records(reversed(lines))
            yield from records([rest])
            rest = b""

    def at(self, offset: int) -> dict[str, Any] | None:
        """The first whole line that begins there or later; None past the last one."""
        index = bisect_right(self._ends, offset)
        while index < len(self._parts):
            begin, end, length = max(offset, self._begin(index)), self._ends[index], PROBE
            inside = begin > self._begin(index)
            while True:
                found = self._read(index, begin - inside, min(end, begin + length))
                lines = found.split(b"\n")[inside:-1]
                if line := next(records(lines), None):
                    return line
                if begin + length >= end:
                    break
                length *= 2
            index += 1
        return None

    def spread(self, count: int) -> list[dict[str, Any]]:
        """About so many lines in order, evenly far apart; of a file of fewer, some twice."""
        found = (self.at(self.size * i // count) for i in range(count))
        return [line for line in found if line]

    def first(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """The first line for which `holds`, where it does so for all lines after that one and for none before."""
        below, above = 0, self.size
        while below < above:
            middle = (below + above) // 2
            line = self.at(middle)
            if line is None or holds(line):
                above = middle
            else:
                below = middle + 1
        return self.at(below)

    def _begin(self, index: int) -> int:
        return self._ends[index - 1] if index else 0

    def _read(self, index: int, start: int, stop: int) -> bytes:
        with self._parts[index].open("rb") as f:
            f.seek(start - self._begin(index))
            return bytes(f.read(stop - start))
