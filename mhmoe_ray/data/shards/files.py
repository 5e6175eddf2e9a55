"""Shard files: the writer and the reader of stored samples.

A shard is an Arrow file of one batch without nulls, memory-mapped for reading in random order. A column (columns.py)
of rows of values is a fixed-size binary, booleans with 8 in a byte; one of values of any length is a large binary, with
a dictionary if equal values are stored once.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mhmoe_ray.data.shards.columns import COLUMNS, IMAGE, TOKENS, Samples, StoredColumns, join_columns, token_dtype
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.storage import replace_file

SHARD_BYTES = 64 << 20
OPEN_SHARDS = 512
"""Largest number of shards that one process keeps open."""


def rows_per_shard(seq_len: int, token_bytes: int) -> int:
    """Return the number of samples that a shard of `SHARD_BYTES` holds, at least 1."""
    return max(1, SHARD_BYTES // ((seq_len + 1) * token_bytes))


def to_batch(columns: StoredColumns) -> pa.RecordBatch:
    """Return one or more samples, their tokens in the dtype of the folder, as a batch with the columns of a shard."""
    arrays = {name: _to_arrow(name, values) for name, values in columns.items()}
    fields = [pa.field(name, array.type, nullable=False) for name, array in arrays.items()]
    return pa.record_batch([*arrays.values()], schema=pa.schema(fields))


def _to_arrow(name: str, values: Any) -> pa.Array:
    column = COLUMNS[name]
    if column.values == "bytes":
        array = pa.array(values, pa.large_binary())
        return array.dictionary_encode() if column.is_shared else array
    rows = np.packbits(values, axis=1) if column.values == "bits" else np.ascontiguousarray(values).view(np.uint8)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])


def join_batches(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Return the rows of one or more batches as one batch."""

    def join(name: str) -> pa.Array:
        # A batch may be a slice of a larger one. If Arrow wrote the slice itself, the padding between the columns of
        # the file would have bytes of the rows after the slice. `concat_arrays` copies only the rows of the slice, so
        # that the bytes of a shard depend on its rows alone.
        columns = [batch.column(name) for batch in batches]
        # `concat_arrays` joins the dictionaries of a column and keeps only one of equal values.
        return pa.concat_arrays([_used_values(column) for column in columns] if COLUMNS[name].is_shared else columns)

    schema = batches[0].schema
    return pa.record_batch([join(name) for name in schema.names], schema=schema)


def _used_values(column: pa.DictionaryArray) -> pa.DictionaryArray:
    """Return a column whose dictionary has only the values that its rows use, in their order."""
    used_numbers = pc.unique(column.indices)
    indices = pc.index_in(column.indices, used_numbers).cast(column.indices.type)
    return pa.DictionaryArray.from_arrays(indices, column.dictionary.take(used_numbers))


def row_bytes(row: pa.RecordBatch) -> int:
    """Return the bytes of the values of one sample, a batch of one row."""
    # Arrow's `nbytes` counts the whole dictionary of the batch for each slice of it.
    return sum(
        len(column[0].as_py()) if COLUMNS[name].is_shared else column.nbytes
        for name, column in zip(row.schema.names, row.columns, strict=True)
    )


def file_content(batch: pa.RecordBatch) -> memoryview:
    """Return the content of an Arrow file of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def write_shard(folder: Path, file: str, batch: pa.RecordBatch) -> Shard:
    """Write samples as a shard file atomically, and return its manifest entry."""
    content = file_content(batch)
    # The file gets its name only when it is complete, so another job never sees a part of it.
    replace_file(folder / file, content)
    return Shard(file=file, rows=len(batch), sha256=hashlib.sha256(content).hexdigest())


def map_file(path: Path | str) -> pa.RecordBatch:
    """Return the samples of an Arrow file as a memory-mapped batch."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).get_batch(0)


def _fixed_columns(batch: pa.RecordBatch, token_bytes: int) -> dict[str, np.ndarray]:
    """Return the columns of a mapped file that have equally long rows, as views; those of bits are packed."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if COLUMNS[name].values != "bytes":
            dtype = token_dtype(token_bytes) if name == TOKENS else np.dtype(np.uint8)
            shape = len(column), column.type.byte_width // dtype.itemsize
            # Buffer 1 of an Arrow column has the values. It is part of the memory map, so nothing is copied.
            columns[name] = np.ndarray(shape, dtype, column.buffers()[1])
    return columns


class _MappedShard(NamedTuple):
    batch: pa.RecordBatch
    fixed_columns: dict[str, np.ndarray]


@lru_cache(maxsize=OPEN_SHARDS)
def _map_shard(path: str, token_bytes: int) -> _MappedShard:
    batch = map_file(path)
    return _MappedShard(batch, _fixed_columns(batch, token_bytes))


class ShardReader:
    """Random access to the samples of a list of shards with equal columns, numbered across all shards from 0."""

    def __init__(self, folder: Path, shards: Sequence[Shard], token_bytes: int) -> None:
        self._paths = [str(folder / s.file) for s in shards]
        self._starts = np.cumsum([0, *(s.rows for s in shards)])
        self._token_bytes = token_bytes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: np.ndarray) -> Samples:
        """Return the tokens of samples with the other columns of equally long rows; there must be a shard."""
        shard_of, row_of = self._locate(numbers)
        columns: dict[str, np.ndarray] = {}
        # The first shard gives the shape and the dtype of no samples.
        for shard in np.unique(shard_of) if len(numbers) else [0]:
            sample_indices = np.flatnonzero(shard_of == shard)
            for name, stored_rows in self._map(shard).fixed_columns.items():
                if name not in columns:
                    columns[name] = np.empty((len(numbers), stored_rows.shape[1]), stored_rows.dtype)
                columns[name][sample_indices] = stored_rows[row_of[sample_indices]]
        length = columns[TOKENS].shape[1]
        # Columns of booleans are stored as bits. Only those of the requested samples are unpacked, because those of
        # whole shards would need much memory.
        return join_columns(
            {
                name: rows if name == TOKENS else np.unpackbits(rows, axis=1, count=length).astype(bool)
                for name, rows in columns.items()
            }
        )

    def read_values(self, column: str, numbers: np.ndarray) -> list[bytes]:
        """Return the values of samples in a column of values of any length."""
        shard_of, row_of = self._locate(numbers)
        return [
            self._map(shard).batch.column(column)[int(row)].as_py() for shard, row in zip(shard_of, row_of, strict=True)
        ]

    def read_column(self, column: str, numbers: np.ndarray) -> np.ndarray | list[bytes]:
        """Return the tokens, the images or the annotations of samples."""
        return self.read(numbers) if column == TOKENS else self.read_values(column, numbers)

    def image_numbers(self) -> np.ndarray:
        """Return each sample's index among the stored images, without reading any image.

        Equal images have different indices only in different shards.
        """
        numbers, count = [np.empty(0, np.int64)], 0
        for shard in range(len(self._paths)):
            column = self._map(shard).batch.column(IMAGE)
            numbers.append(count + column.indices.to_numpy().astype(np.int64))
            count += len(column.dictionary)
        return np.concatenate(numbers)

    def _map(self, shard: int) -> _MappedShard:
        return _map_shard(self._paths[shard], self._token_bytes)

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each sample, and its row there."""
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        return shard_of, numbers - self._starts[shard_of]
