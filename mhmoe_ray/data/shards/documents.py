"""The index of the documents in a shard: a Parquet file `<shard>.documents` with a row for each piece of a document.

    sample   number of the sample in the shard
    offset   first of its inputs that belongs to the piece, which ends where the next one begins
    file     path or URI of the raw file, followed by the name of an image or of a sample in a tar file
    line     first line of the document in the file, or its row or member, from 1
    lines    number of lines that it takes

A token belongs to a document as an input: the start token that is the last target of one document is the first input of
the next. The index has the SHA-256 of its shard, and the manifest does not list it, so that folders with and without
indexes are the same data.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import Location, read_file, replace_file, retry_reads

_SHARD_KEY = b"shard"
_INTEGERS = {"sample": pa.int32(), "offset": pa.int32(), "line": pa.int64(), "lines": pa.int32()}


class DocumentOrigin(NamedTuple):
    """Place of a document in the raw text."""

    file: str
    line: int


class DocumentPieces(NamedTuple):
    """Columns of an index, sorted by sample and offset."""

    sample: np.ndarray
    offset: np.ndarray
    file: pa.DictionaryArray
    line: np.ndarray
    lines: np.ndarray


def index_file(shard: Location) -> Location:
    """Return the path of a shard's index."""
    return shard.parent / f"{shard.name}.documents"


def write_index(folder: Location, shard: Shard, pieces: DocumentPieces) -> None:
    """Write the index of a shard atomically."""
    columns = {name: pa.array(getattr(pieces, name), kind) for name, kind in _INTEGERS.items()}
    table = pa.table({**columns, "file": pieces.file}).replace_schema_metadata({_SHARD_KEY: shard.sha256})
    sink = pa.BufferOutputStream()
    encodings = dict.fromkeys(_INTEGERS, "DELTA_BINARY_PACKED")
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=["file"], column_encoding=encodings, write_page_checksum=True
    )
    replace_file(index_file(folder / shard.file), memoryview(sink.getvalue()))


def _read_index(path: Location, sha256: str) -> pa.Table | None:
    """Read the index of a shard of this hash; None without one."""
    fix = "remove it, or restore it from the folder that it was copied from"
    try:
        content = retry_reads(lambda: read_file(path))
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"index {path}", f"it cannot be read ({' '.join(str(e).split())})", fix) from e
    if (table.schema.metadata or {}).get(_SHARD_KEY) != sha256.encode():
        raise DataError(f"index {path}", "it is of another shard", fix)
    return table


OPEN_INDEXES = 64
"""Largest number of indexes of a domain that are kept in memory."""


class DocumentIndex:
    """The documents of a domain's samples, numbered across all its shards from 0."""

    def __init__(self, folder: Location, shards: Sequence[Shard]) -> None:
        self._shards = [(index_file(folder / shard.file), shard.sha256) for shard in shards]
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._open = lru_cache(maxsize=OPEN_INDEXES)(lambda shard: _read_index(*self._shards[shard]))

    @property
    def exists(self) -> bool:
        """True if all shards have an index."""
        return all(path.exists() for path, _ in self._shards)

    def documents_of(self, sample: int) -> dict[int, DocumentOrigin] | None:
        """Return the document at each offset of a sample where one begins or goes on; None without an index."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        table = self._open(shard)
        if table is None:
            return None
        row = sample - self._starts[shard]
        samples = table["sample"].to_numpy()
        start, stop = (int(np.searchsorted(samples, row, side=side)) for side in ("left", "right"))
        pieces = table.slice(start, stop - start).to_pylist()
        return {piece["offset"]: DocumentOrigin(piece["file"], piece["line"]) for piece in pieces}

    def samples_of(self, file: str, line: int | None) -> dict[DocumentOrigin, list[int]]:
        """Return the samples that have text of the documents of a file, or of the one with a line.

        A file is named by the path that the index has, by the end of it, or by a path that leads there.
        """
        samples_by_origin: dict[DocumentOrigin, list[int]] = {}
        names = {file, str(Path(file).resolve())}
        for (path, sha256), first_sample in zip(self._shards, self._starts, strict=False):
            table = _read_index(path, sha256)
            assert table is not None
            files = table["file"].unique().to_pylist()
            matching = [name for name in files if name in names or name.endswith(f"/{file.removeprefix('./')}")]
            if not matching:
                continue
            mask = pc.is_in(table["file"].cast(pa.string()), pa.array(matching, pa.string()))
            if line is not None:
                ends = pc.add(table["line"], table["lines"].cast(pa.int64()))
                mask = pc.and_(mask, pc.and_(pc.less_equal(table["line"], line), pc.greater(ends, line)))
            for piece in table.filter(mask).to_pylist():
                origin = DocumentOrigin(piece["file"], piece["line"])
                samples_by_origin.setdefault(origin, []).append(int(first_sample) + piece["sample"])
        return samples_by_origin
