"""One stream of all tokens of a domain, which are stored in parts, one for each chunk."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mhmoe_ray.errors import DataError

Tokens = np.ndarray[tuple[int], np.dtype[Any]]
"""Token ids, or rows with a field for each column (data/shards/columns.py)."""


class PartSlice(NamedTuple):
    """Training documents or held-out documents of a part, as a slice of its tokens."""

    name: str
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Number of tokens in the slice."""
        return self.stop - self.start


class TokenStream:
    """Stream of the tokens of several part slices; only `read` reads from disk."""

    def __init__(self, folder: Path, parts: Sequence[PartSlice], dtype: np.dtype[Any]) -> None:
        self._folder, self.dtype = folder, dtype
        self.parts = parts
        self._ends = list(accumulate((part.tokens for part in parts), initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def substream(self, start: int, stop: int) -> "TokenStream":
        """Return the tokens start .. stop - 1 as a stream."""
        first_part, end_part = bisect_right(self._ends, start) - 1, bisect_left(self._ends, stop)
        parts = [
            PartSlice(part.name, part.start + max(start - offset, 0), part.stop - max(offset + part.tokens - stop, 0))
            for part, offset in zip(self.parts[first_part:end_part], self._ends[first_part:end_part], strict=True)
        ]
        return TokenStream(self._folder, parts, self.dtype)

    def read(self) -> Tokens:
        """Read all tokens into one array; a part that is too short is a DataError."""
        # The empty array is added because np.concatenate needs at least one array. It also fixes the dtype.
        return np.concatenate([*self._read_parts(), np.empty(0, self.dtype)])

    def _read_parts(self) -> Iterator[Tokens]:
        for part in self.parts:
            path = part_file(self._folder, part.name)
            tokens = np.fromfile(path, self.dtype, part.tokens, offset=part.start * self.dtype.itemsize)
            # np.fromfile raises no error for a file that is too short, but returns fewer items.
            if len(tokens) < part.tokens:
                reason = f"it has {len(tokens):,} tokens of {part.tokens:,} from {part.start:,} on"
                raise DataError(f"part {path}", reason, "remove that folder of parts and prepare again")
            yield tokens


def part_file(folder: Path, name: str) -> Path:
    """Return the path of the file with a part's tokens."""
    # There are many such files, so they are spread over 256 folders.
    return folder / name[:2] / f"{name}.tokens"
