"""The reader of stored samples: random access to the rows of a folder's shards.

local path        each shard is memory-mapped
object store      the shard is in the cache of the node, and memory-mapped there (cache.py), if all shards fit
                  single rows are read by ranges of bytes (ranges.py), if they do not fit
                  the whole shard is read into memory, in preparations
"""

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mhmoe_ray.data.shards.cache import CachePlan, ShardCache
from mhmoe_ray.data.shards.columns import IMAGE, TOKENS, Samples, join_columns, token_dtype
from mhmoe_ray.data.shards.files import byte_columns, open_batch
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.data.shards.ranges import RangedShard
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import Location, ObjectPath

OPEN_SHARDS = 512
"""Largest number of shards that one process keeps open; those of which single rows are read are small."""
OPEN_RANGED_SHARDS = 8192
SHARDS_IN_MEMORY = 2
_FETCHERS = 16
"""Number of shards that a process fetches or opens at the same time."""


class BatchShard(NamedTuple):
    """A shard in memory, or mapped into memory."""

    batch: pa.RecordBatch
    byte_columns: dict[str, np.ndarray]

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows by column, (numbers, bytes)."""
        return {name: column[numbers] for name, column in self.byte_columns.items()}


def _with_columns(batch: pa.RecordBatch) -> BatchShard:
    return BatchShard(batch, byte_columns(batch))


def _open_batch(path: Location) -> BatchShard:
    return _with_columns(open_batch(path))


_open_local = lru_cache(maxsize=OPEN_SHARDS)(_open_batch)
_open_in_memory = lru_cache(maxsize=SHARDS_IN_MEMORY)(_open_batch)
_open_ranged = lru_cache(maxsize=OPEN_RANGED_SHARDS)(RangedShard)


@lru_cache(maxsize=OPEN_SHARDS)
def _open_cached(source: ObjectPath, sha256: str, plan: CachePlan) -> BatchShard | RangedShard:
    file = ShardCache(plan.path, plan.limit).open(source, sha256)
    if file is None:
        shard = _open_ranged(source)
        if not shard.has_checks:
            # Whole shards are checked when they arrive, so nobody has checked this one.
            reason = f"the cache {plan.path} has no room for it, and its rows have no CRC32s"
            raise DataError(f"prepared file {source}", reason, "make room, or copy the folder by mhmoe data copy")
        return shard
    with file:
        # The map has a descriptor of its own. While the batch is used, its lock keeps the shard in the cache.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _with_columns(pa.ipc.open_file(pa.py_buffer(content)).get_batch(0))


class ShardReader:
    """Random access to the samples of a list of shards with equal columns, numbered across all shards from 0."""

    def __init__(
        self, folder: Location, shards: Sequence[Shard], token_bytes: int, cache_plan: CachePlan | None = None
    ) -> None:
        """Prepare reading; shards on an object store are read into memory one after another without `cache_plan`."""
        self._shards = [(folder / s.file, s.sha256) for s in shards]
        self._starts = np.cumsum([0, *(s.rows for s in shards)])
        self._token_bytes, self._cache_plan = token_bytes, cache_plan

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: np.ndarray) -> Samples:
        """Return the tokens of samples with the other columns of equally long rows; there must be a shard."""
        shard_of, row_of = self._locate(numbers)
        # The first shard gives the shape and the dtype of no samples.
        shards = np.unique(shard_of) if len(numbers) else np.zeros(1, np.int64)
        indices = [np.flatnonzero(shard_of == shard) for shard in shards]
        columns: dict[str, np.ndarray] = {}
        for sample_indices, rows in zip(indices, self._read_rows(shards, [row_of[i] for i in indices]), strict=True):
            for name, values in rows.items():
                if name not in columns:
                    columns[name] = np.empty((len(numbers), values.shape[1]), values.dtype)
                columns[name][sample_indices] = values
        columns[TOKENS] = columns[TOKENS].view(token_dtype(self._token_bytes))
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
        """Return the values of samples in a column of values of any length; empty ones if a shard lacks the column."""
        shard_of, row_of = self._locate(numbers)
        batches = {shard: self._batch(shard) for shard in np.unique(shard_of)}
        return [
            batches[shard].column(column)[int(row)].as_py() if column in batches[shard].schema.names else b""
            for shard, row in zip(shard_of, row_of, strict=True)
        ]

    def read_column(self, column: str, numbers: np.ndarray) -> np.ndarray | list[bytes]:
        """Return the tokens, the images or the annotations of samples."""
        return self.read(numbers) if column == TOKENS else self.read_values(column, numbers)

    def image_numbers(self) -> np.ndarray:
        """Return each sample's index among the stored images, without reading any image.

        Equal images have different indices only in different shards.
        """
        numbers, count = [np.empty(0, np.int64)], 0
        for shard in range(len(self._shards)):
            column = self._batch(shard).column(IMAGE)
            numbers.append(count + column.indices.to_numpy().astype(np.int64))
            count += len(column.dictionary)
        return np.concatenate(numbers)

    def _read_rows(self, shards: np.ndarray, rows: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Yield rows of each shard by column; those on an object store are fetched at the same time."""

        def read(shard: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
            return self._open(shard).rows(numbers)

        is_remote = isinstance(self._shards[0][0], ObjectPath) and self._cache_plan is not None
        if not is_remote or len(shards) == 1:
            yield from map(read, shards, rows)
            return
        with ThreadPoolExecutor(_FETCHERS) as threads:
            yield from threads.map(read, shards, rows)

    def _open(self, shard: int) -> BatchShard | RangedShard:
        (path, sha256), plan = self._shards[shard], self._cache_plan
        if not isinstance(path, ObjectPath):
            return _open_local(path)
        if plan is None:
            return _open_in_memory(path)
        return _open_cached(path, sha256, plan) if plan.holds_all else _open_ranged(path)

    def _batch(self, shard: int) -> pa.RecordBatch:
        """Return all rows of a shard with values of any length, which cannot be read one by one."""
        opened = self._open(shard)
        if isinstance(opened, RangedShard):
            reason = "its images can only be read from whole shards, and the cache of this node has no room for them"
            raise DataError(f"prepared file {self._shards[shard][0]}", reason, "raise cluster.shard_cache.size_gb")
        return opened.batch

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each sample, and its row there."""
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        return shard_of, numbers - self._starts[shard_of]
