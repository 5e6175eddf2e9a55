"""Shard files of packed samples: writing and reading them, and the check of all files of a prepared folder.

A shard is an Arrow file of one batch, whose columns (columns.py) are fixed-size binaries without nulls, memory-mapped
for reading in random order.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from mhmoe_ray.data.shards.columns import TOKENS, Samples, columns_of, join_columns, token_dtype
from mhmoe_ray.data.shards.manifest import (
    DataManifest,
    Shard,
)
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import describe_file, replace_file

SHARD_BYTES = 64 << 20
OPEN_SHARDS = 512
"""Largest number of shards that one process keeps open."""


def rows_per_shard(seq_len: int, token_bytes: int) -> int:
    """Return the number of samples that a shard of `SHARD_BYTES` holds, at least 1."""
    return max(1, SHARD_BYTES // ((seq_len + 1) * token_bytes))


def write_shard(folder: Path, file: str, samples: Samples) -> Shard:
    """Write one or more samples, in the dtype of the folder's tokens, as a shard file atomically."""
    columns = {name: _stored_bytes(column) for name, column in columns_of(samples).items()}
    arrays = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])
        for rows in columns.values()
    ]
    fields = [pa.field(name, array.type, nullable=False) for name, array in zip(columns, arrays, strict=True)]
    sink = pa.BufferOutputStream()
    batch = pa.record_batch(arrays, schema=pa.schema(fields))
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = memoryview(sink.getvalue())
    # The file gets its name only when it is complete, so another job never sees a part of it.
    replace_file(folder / file, content)
    return Shard(file=file, rows=len(samples), sha256=hashlib.sha256(content).hexdigest())


def _stored_bytes(column: np.ndarray) -> np.ndarray:
    """Return each row of a column as a shard stores it, (rows, bytes) uint8."""
    if column.dtype == np.bool_:
        return np.packbits(column, axis=1)
    return np.ascontiguousarray(column).view(np.uint8)


class ShardReader:
    """Random access to the samples of a list of shards with equal columns."""

    def __init__(self, folder: Path, shards: Sequence[Shard], token_bytes: int) -> None:
        self._paths = [str(folder / s.file) for s in shards]
        self._starts = np.cumsum([0, *(s.rows for s in shards)])
        self._token_bytes = token_bytes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: np.ndarray) -> Samples:
        """Return one or more samples, numbered across all shards from 0."""
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        row_of = numbers - self._starts[shard_of]
        shards = np.unique(shard_of)
        columns: dict[str, np.ndarray] = {}
        for shard in shards:
            sample_indices = np.flatnonzero(shard_of == shard)
            for name, stored_rows in _map_columns(self._paths[shard], self._token_bytes).items():
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


@lru_cache(maxsize=OPEN_SHARDS)
def _map_columns(path: str, token_bytes: int) -> dict[str, np.ndarray]:
    """Return a shard's memory-mapped columns, those of bits packed 8 in a byte."""
    with pa.memory_map(path) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        dtype = token_dtype(token_bytes) if name == TOKENS else np.dtype(np.uint8)
        shape = len(column), column.type.byte_width // dtype.itemsize
        # Buffer 1 of an Arrow column has the values. It is part of the memory map, so nothing is copied.
        columns[name] = np.ndarray(shape, dtype, column.buffers()[1])
    return columns


FILES_PER_TASK = 16
LOCAL_CHECK_BYTES = 1 << 30
"""Largest bytes of shards that one process verifies faster than a cluster."""


def verify_shards(folder: Path, manifest: DataManifest) -> None:
    """Raise DataError if a file of a prepared folder is missing or its content is not what was written."""
    # All files are read, so the whole cluster shares the work if the data have more than `LOCAL_CHECK_BYTES` bytes.
    shards = [*(s for d in manifest.domains.values() for s in d.shards), *manifest.validation]
    expected_hashes = {s.file: s.sha256 for s in shards}
    expected_hashes |= {name: sha256 for name, sha256 in manifest.files.items() if sha256 is not None}
    rows = [{"file": file, "sha256": sha256} for file, sha256 in expected_hashes.items()]
    total_bytes = sum(s.rows for s in shards) * manifest.seq_len * manifest.token_bytes
    total_bytes += sum(d.image_bytes or 0 for d in manifest.domains.values())
    for problem in (_check_locally if total_bytes <= LOCAL_CHECK_BYTES else _check_on_cluster)(rows, folder):
        raise DataError(
            f"prepared file {folder / problem['file']}", problem["reason"], f"remove {folder} and prepare again"
        )


def _check_locally(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    # Hashing releases the GIL, so threads verify files in parallel.
    with ThreadPoolExecutor() as threads:
        yield from (row for row in threads.map(partial(_check_file, folder=folder), rows) if row["reason"])


def _check_on_cluster(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    files = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // FILES_PER_TASK))
    files.context.enable_progress_bars = False
    # One problem is enough for the error, so the other files need not be read.
    yield from files.map(partial(_check_file, folder=folder)).filter(lambda row: row["reason"] != "").take(1)


def _check_file(row: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    return {"file": row["file"], "reason": file_problem(folder / row["file"], row["sha256"]) or ""}


def file_problem(path: Path, sha256: str) -> str | None:
    """Return the reason why a file does not have this SHA-256, or None."""
    if not path.is_file():
        return "it is missing"
    return None if describe_file(path).sha256 == sha256 else "its content is not what was written"
