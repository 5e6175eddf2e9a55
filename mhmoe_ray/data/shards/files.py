"""Shard files: their layout, and the writer of stored samples.

A shard is an Arrow file of one batch without nulls, so that samples can be read in random order. A column (columns.py)
of rows of values is a fixed-size binary, booleans with 8 in a byte; one of values of any length is a large binary, with
a dictionary if equal values are stored once.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mhmoe_ray.data.shards.columns import COLUMNS, StoredColumns
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.data.shards.ranges import write_checks
from mhmoe_ray.storage import Location, ObjectPath, read_file, replace_file, retry_reads

SHARD_BYTES = 64 << 20


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


def write_shard(folder: Location, file: str, batch: pa.RecordBatch) -> Shard:
    """Write samples as a shard file atomically, and return its manifest entry."""
    content = file_content(batch)
    # The file gets its name only when it is complete, so another job never sees a part of it.
    replace_file(folder / file, content)
    if isinstance(folder, ObjectPath) and has_fixed_rows(batch):
        write_checks(folder / file, byte_columns(batch))
    return Shard(file=file, rows=len(batch), sha256=hashlib.sha256(content).hexdigest())


def open_batch(path: Location) -> pa.RecordBatch:
    """Return the samples of an Arrow file as a batch, memory-mapped if the file is local."""
    if isinstance(path, ObjectPath):
        return pa.ipc.open_file(pa.BufferReader(retry_reads(lambda: read_file(path)))).get_batch(0)
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).get_batch(0)


def has_fixed_rows(batch: pa.RecordBatch) -> bool:
    """Return whether all columns have equally long rows."""
    return all(COLUMNS[name].values != "bytes" for name in batch.schema.names)


def byte_columns(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Return the columns of a batch that have equally long rows, as views (rows, bytes); those of bits are packed."""
    # Buffer 1 of an Arrow column has the values. It may be part of a memory map, so nothing is copied.
    return {
        name: np.ndarray((len(column), column.type.byte_width), np.uint8, column.buffers()[1])
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
        if COLUMNS[name].values != "bytes"
    }
