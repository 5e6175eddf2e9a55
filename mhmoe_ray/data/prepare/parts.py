"""The tokens of a domain as one stream over the parts made from its chunks."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.shards.files import token_dtype
from mhmoe_ray.errors import DataError

Tokens = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]


class PartRef(NamedTuple):
    """Reference to a stretch of a part's tokens: either those of the training documents, or those of the held-out
    ones."""

    name: str
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


class Stream:
    """Tokens of several parts, one after another.

    Args:
        folder: the folder of the parts.
        parts: the parts of a domain, in the order of its files and chunks.
        token_bytes: bytes per token, 2 or 4.
    """

    def __init__(self, folder: Path, parts: Sequence[PartRef], token_bytes: int) -> None:
        self._folder, self._dtype = folder, token_dtype(token_bytes)
        self.parts = parts
        self._ends = list(accumulate((part.tokens for part in parts), initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def part(self, start: int, stop: int) -> "Stream":
        """Return the tokens start .. stop - 1 as a stream of their own."""
        first, last = bisect_right(self._ends, start) - 1, bisect_left(self._ends, stop)
        parts = [
            PartRef(part.name, part.start + max(start - at, 0), part.stop - max(at + part.tokens - stop, 0))
            for part, at in zip(self.parts[first:last], self._ends[first:last], strict=True)
        ]
        return Stream(self._folder, parts, self._dtype.itemsize)

    def read(self) -> Tokens:
        """Read all tokens of the stream.

        Raises:
            DataError: a part has fewer tokens than expected.
        """
        return np.concatenate([*self._each(), np.empty(0, self._dtype)])

    def _each(self) -> Iterator[Tokens]:
        for part in self.parts:
            where = part_file(self._folder, part.name)
            tokens = np.fromfile(where, self._dtype, part.tokens, offset=part.start * self._dtype.itemsize)
            if len(tokens) < part.tokens:
                why = f"it has {len(tokens):,} tokens of {part.tokens:,} from {part.start:,} on"
                raise DataError(f"part {where}", why, "remove that folder of parts and prepare again")
            yield tokens


def part_file(folder: Path, name: str) -> Path:
    """Return the file of a part's tokens; there are many, so they are spread over 256 folders."""
    return folder / name[:2] / f"{name}.tokens"
