"""Parts, the files of tokenised chunks: their records, and one stream over all tokens of a domain."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel

from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import Location, read_range

Tokens = np.ndarray[tuple[int], np.dtype[Any]]
"""Token ids, or rows with a field for each column (data/shards/columns.py)."""


class RowCounts(BaseModel):
    """Counts of the rows in a part; those without `held_out` count training rows or documents."""

    samples: int = 0
    held_out_samples: int = 0
    images: int = 0
    """Training rows with an image."""
    image_bytes: int = 0
    targets: int = 0
    """Tokens without start tokens and padding."""
    padding: int = 0
    cut_documents: int = 0
    """Documents that were cut, or became several rows."""
    cut_tokens: int = 0
    """Tokens in no row, because their document was cut."""
    class_names: list[str] = []
    """All classes in the annotations of a vision model, sorted."""
    class_counts: dict[str, int] = {}
    """Training rows of each class of an encoder's questions and sentences."""
    objects_without_mask: int = 0
    """All annotated objects with a box but no mask."""
    file_bytes: int = 0


class PartSlice(NamedTuple):
    """Training documents or held-out documents of a part, as a slice of its tokens or rows."""

    name: str
    start: int
    stop: int
    path: str = ""
    """Path or URI of the raw file."""
    first_line: int = 0
    """Position of the chunk's first document in the raw file."""

    @property
    def length(self) -> int:
        return self.stop - self.start


class PartCounts(BaseModel):
    """Counts of a part, which has the training documents first, then the held-out ones."""

    documents: int = 0
    """Number of training documents."""
    tokens: int = 0
    """Tokens of the training documents, with their start tokens."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    smallest_fraction: float = 0
    """Smallest held-out share that holds out one of the documents; 0 if an older version made the part."""
    text_bytes: int = 0
    """UTF-8 bytes of the texts of all documents."""
    rows: RowCounts | None = None
    """None for a decoder."""


class PartRecord(PartCounts):
    """Content of the file beside a part: its counts, and list entries for its training documents.

    `TokenisedPart` has the path of the raw file, because a part is used again after its file was moved.
    """

    lines: list[int]
    """Positions in the raw file after that of the chunk's first document."""
    line_counts: list[int]
    lengths: list[int]
    """Numbers of tokens, with start tokens, or of rows."""
    names: list[str]
    """`Document.name`; empty if no document of the part has one."""


class TokenisedPart(NamedTuple):
    """Record of a part, which the driver keeps until all shards are packed."""

    file: int
    chunk: int
    name: str
    """Empty for a chunk without documents."""
    counts: PartCounts
    path: str = ""
    first_line: int = 0

    def documents_slice(self, *, held_out: bool) -> PartSlice:
        """Return the training documents or the held-out documents as a slice of the part's tokens or rows."""
        rows = self.counts.rows
        training = self.counts.tokens if rows is None else rows.samples
        if not held_out:
            return PartSlice(self.name, 0, training, self.path, self.first_line)
        held_out_count = self.counts.held_out_tokens if rows is None else rows.held_out_samples
        return PartSlice(self.name, training, training + held_out_count)


class TokenStream:
    """Stream of the tokens of several part slices; only `read` reads from disk."""

    def __init__(self, folder: Location, parts: Sequence[PartSlice], dtype: np.dtype[Any]) -> None:
        self._folder, self.dtype = folder, dtype
        self.parts = parts
        self._ends = list(accumulate((part.length for part in parts), initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def substream(self, start: int, stop: int) -> "TokenStream":
        """Return the tokens start .. stop - 1 as a stream."""
        first_part, end_part = bisect_right(self._ends, start) - 1, bisect_left(self._ends, stop)
        parts = [
            part._replace(
                start=part.start + max(start - offset, 0), stop=part.stop - max(offset + part.length - stop, 0)
            )
            for part, offset in zip(self.parts[first_part:end_part], self._ends[first_part:end_part], strict=True)
        ]
        return TokenStream(self._folder, parts, self.dtype)

    def read(self) -> Tokens:
        """Read all tokens into one array; a part that is too short is a DataError."""
        # The empty array is added because np.concatenate needs at least one array. It also fixes the dtype.
        arrays = [np.empty(0, self.dtype)]
        for part in self.parts:
            path = part_file(self._folder, part.name)
            size = self.dtype.itemsize
            content = read_range(path, part.start * size, part.length * size)
            tokens = np.frombuffer(content, self.dtype, len(content) // size)
            if len(tokens) < part.length:
                reason = f"it has {len(tokens):,} tokens of {part.length:,} from {part.start:,} on"
                raise DataError(f"part {path}", reason, "remove that folder of parts and prepare again")
            arrays.append(tokens)
        return np.concatenate(arrays)


def record_file(part: Location) -> Location:
    """Return the path of the `PartRecord` of a part."""
    return part.with_suffix(".json")


def part_file(folder: Location, name: str, *, has_rows: bool = False) -> Location:
    """Return the path of the file with a part's tokens or rows."""
    # There are many such files, so they are spread over 256 folders.
    return folder / name[:2] / f"{name}.{'arrow' if has_rows else 'tokens'}"
