"""Parquet shards of packed samples: writing them, and reading any samples of a domain.

A sample is T + 1 tokens: the first T are a model's input, the last T its targets. Samples overlap by one token, so each
token of a domain is a target exactly once. The column is a fixed-size binary, uncompressed, so that reading a row group
is a copy; row groups are small, since training reads samples in random order.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mhmoe_ray.data.shards.manifest import DataManifest, Shard
from mhmoe_ray.errors import DataError
from mhmoe_ray.runs.manifest import describe_file

Samples = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""(samples, T + 1) token ids."""

SHARD_BYTES = 64 << 20
ROW_GROUP_BYTES = 256 << 10
OPEN_SHARDS = 32  # of one domain in one process


def token_dtype(token_bytes: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"<u{token_bytes}")


def token_bytes_for(vocab_size: int) -> int:
    """Bytes per token; the largest value is kept free to mark padding."""
    return 2 if vocab_size < 2**16 else 4


def padding_token(token_bytes: int) -> int:
    """Marks what fills up a sample; as a target it does not count."""
    return int(np.iinfo(token_dtype(token_bytes)).max)


def split_padding(tokens: np.ndarray, token_bytes: int) -> tuple[Samples, np.ndarray]:
    """Stored samples (samples, T + 1) as a model takes them: padding as token 0; and the targets that count, a mask
    (samples, T)."""
    real = tokens != padding_token(token_bytes)
    return np.where(real, tokens, 0).astype(np.int64), real[:, 1:]


class ShardWriter:
    """Writes samples to `<folder>/<name>/00000.parquet` and on, a new file every `SHARD_BYTES`."""

    def __init__(self, folder: Path, name: str, seq_len: int, token_bytes: int) -> None:
        self._folder, self._name = folder, name
        self._row_bytes, self._dtype = (seq_len + 1) * token_bytes, token_dtype(token_bytes)
        self._schema = pa.schema([("tokens", pa.binary(self._row_bytes))])
        self._rows_per_shard = max(1, SHARD_BYTES // self._row_bytes)
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0
        self.shards: list[Shard] = []

    def write(self, samples: np.ndarray) -> None:
        self._pending.append(samples.astype(self._dtype))
        self._pending_rows += len(samples)
        while self._pending_rows >= self._rows_per_shard:
            rows = np.concatenate(self._pending)
            self._flush(rows[: self._rows_per_shard])
            self._pending = [rows[self._rows_per_shard :]]
            self._pending_rows = len(self._pending[0])

    def close(self) -> list[Shard]:
        if self._pending_rows:
            self._flush(np.concatenate(self._pending))
            self._pending, self._pending_rows = [], 0
        return self.shards

    def _flush(self, rows: np.ndarray) -> None:
        file = f"{self._name}/{len(self.shards):05d}.parquet"
        path = self._folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(self._row_bytes), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
        )
        pq.write_table(
            pa.table([column], schema=self._schema),
            path,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            row_group_size=max(1, ROW_GROUP_BYTES // self._row_bytes),
        )
        self.shards.append(Shard(file=file, rows=len(rows), sha256=describe_file(path).sha256))


class ShardReader:
    """Random access to the samples of a list of shards, in their order. Files are opened when they are needed."""

    def __init__(self, folder: Path, shards: Sequence[Shard], token_bytes: int) -> None:
        self._paths = [folder / s.file for s in shards]
        self._starts = np.cumsum([0, *(s.rows for s in shards)])
        self._dtype = token_dtype(token_bytes)
        self._file = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: np.ndarray) -> Samples:
        """Samples by number, as int64; each row group that holds one of them is read once."""
        shard_of = np.searchsorted(self._starts, index, side="right") - 1
        rows: Samples | None = None
        for shard in np.unique(shard_of):
            file = self._file(int(shard))
            row_of = index - self._starts[shard]
            group_rows = file.metadata.row_group(0).num_rows
            for group in np.unique(row_of[shard_of == shard] // group_rows):
                wanted = (shard_of == shard) & (row_of // group_rows == group)
                tokens = self._read_group(file, int(group))[row_of[wanted] - group * group_rows]
                if rows is None:
                    rows = np.empty((len(index), tokens.shape[1]), np.int64)
                rows[wanted] = tokens
        assert rows is not None, "at least one sample is asked for"
        return rows

    def _open(self, shard: int) -> pq.ParquetFile:
        return pq.ParquetFile(self._paths[shard], memory_map=True)

    def _read_group(self, file: pq.ParquetFile, group: int) -> np.ndarray:
        column = file.read_row_group(group, columns=["tokens"]).column(0).combine_chunks()
        data = np.frombuffer(column.buffers()[1], self._dtype)
        return data.reshape(len(column), -1)


def verify_shards(folder: Path, manifest: DataManifest) -> None:
    """Every shard is there with the content it was written with.

    Raises:
        DataError: one is missing or damaged.
    """
    for shard in [s for d in manifest.domains.values() for s in d.shards] + manifest.validation:
        path = folder / shard.file
        why = None
        if not path.is_file():
            why = "it is missing"
        elif describe_file(path).sha256 != shard.sha256:
            why = "its content is not what was written"
        if why:
            raise DataError(f"shard {path}", why, f"remove {folder} and prepare again")
