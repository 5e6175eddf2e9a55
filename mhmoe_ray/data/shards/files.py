"""Shard files of packed samples: writing, reading and verifying them.

A sample is T + 1 tokens: the first T are a model's input, the last T its targets. Its end may be padding, whose targets
do not count. A shard is an Arrow file of one batch and one column, a fixed-size binary without nulls. Training reads
samples in random order: the file is memory-mapped, and a sample is read by its number without its neighbours.
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

from mhmoe_ray.data.shards.manifest import DataManifest, Shard
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import describe_file, replace_file

Samples = np.ndarray[tuple[int, int], np.dtype[Any]]
"""Array of token ids, (samples, T + 1)."""

SHARD_BYTES = 64 << 20
OPEN_SHARDS = 512
"""Largest number of shards that one process keeps open."""


def token_dtype(token_bytes: int) -> np.dtype[np.unsignedinteger]:
    """Return the dtype of stored tokens: little-endian unsigned integers of `token_bytes` bytes."""
    return np.dtype(f"<u{token_bytes}")


def token_bytes_for(vocab_size: int) -> int:
    """Return the number of bytes in which a token is stored, 2 or 4.

    The largest value of that size is no token id, since it marks padding.
    """
    return 2 if vocab_size < 2**16 else 4


def padding_token(token_bytes: int) -> int:
    """Return the value that marks padding in stored samples: the largest one of a token of `token_bytes` bytes."""
    return int(np.iinfo(token_dtype(token_bytes)).max)


def split_padding(tokens: np.ndarray, token_bytes: int) -> tuple[Samples, np.ndarray]:
    """Convert stored samples (samples, T + 1) to the input of a model.

    Returns:
        The samples as int64 with token 0 for padding, and a mask (samples, T) of the targets that count.
    """
    is_token = tokens != padding_token(token_bytes)
    return np.where(is_token, tokens, 0).astype(np.int64), is_token[:, 1:]


def rows_per_shard(seq_len: int, token_bytes: int) -> int:
    """Return the number of samples that a shard of `SHARD_BYTES` holds, at least 1."""
    return max(1, SHARD_BYTES // ((seq_len + 1) * token_bytes))


def write_shard(folder: Path, file: str, samples: Samples) -> Shard:
    """Write one shard file in one step and return its entry for the manifest.

    Args:
        folder: the folder of the prepared data.
        file: the path of the file below that folder.
        samples: the samples, at least one, in the dtype of the folder's tokens.
    """
    row_bytes = samples.shape[1] * samples.itemsize
    rows = pa.py_buffer(np.ascontiguousarray(samples))
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(row_bytes), len(samples), [None, rows])
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([column], schema=pa.schema([pa.field("tokens", pa.binary(row_bytes), nullable=False)]))
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = memoryview(sink.getvalue())
    # The file gets its name only when it is complete, so another job never sees a part of it.
    replace_file(folder / file, content)
    return Shard(file=file, rows=len(samples), sha256=hashlib.sha256(content).hexdigest())


class ShardReader:
    """Random access to the samples of a list of shards, in the order of the list."""

    def __init__(self, folder: Path, shards: Sequence[Shard], token_bytes: int) -> None:
        self._paths = [str(folder / s.file) for s in shards]
        self._starts = np.cumsum([0, *(s.rows for s in shards)])
        self._token_bytes = token_bytes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: np.ndarray) -> Samples:
        """Return samples by their numbers, in the dtype of the folder's tokens.

        Args:
            numbers: the numbers of the samples, at least one.
        """
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        row_of = numbers - self._starts[shard_of]
        shards = np.unique(shard_of)
        first_samples = _map_samples(self._paths[shards[0]], self._token_bytes)
        rows = np.empty((len(numbers), first_samples.shape[1]), first_samples.dtype)
        for shard in shards:
            sample_indices = np.flatnonzero(shard_of == shard)
            rows[sample_indices] = _map_samples(self._paths[shard], self._token_bytes)[row_of[sample_indices]]
        return rows


@lru_cache(maxsize=OPEN_SHARDS)
def _map_samples(path: str, token_bytes: int) -> Samples:
    """Return all samples of a shard file as a memory-mapped array; a process caches the last `OPEN_SHARDS` files."""
    with pa.memory_map(path) as source:
        column = pa.ipc.open_file(source).get_batch(0).column(0)
    shape = len(column), column.type.byte_width // token_bytes
    # Buffer 1 has the values and is part of the memory map, so nothing is copied.
    return np.ndarray(shape, token_dtype(token_bytes), column.buffers()[1])


FILES_PER_TASK = 16
LOCAL_CHECK_BYTES = 1 << 30
"""Number of bytes up to which one process verifies shards in less time than Ray needs to start others."""


def verify_shards(folder: Path, manifest: DataManifest) -> None:
    """Verify that the shards and the tokenizer of a prepared folder exist and have the content that was written.

    Raises:
        DataError: a file is missing or damaged.
    """
    # All files are read, so the whole cluster shares the work if the data have more than `LOCAL_CHECK_BYTES` bytes.
    shards = [*(s for d in manifest.domains.values() for s in d.shards), *manifest.validation]
    expected_hashes = {"tokenizer.json": manifest.tokenizer_sha256} | {s.file: s.sha256 for s in shards}
    rows = [{"file": file, "sha256": sha256} for file, sha256 in expected_hashes.items()]
    total_bytes = sum(s.rows for s in shards) * manifest.seq_len * manifest.token_bytes
    for problem in (_check_locally if total_bytes <= LOCAL_CHECK_BYTES else _check_on_cluster)(rows, folder):
        raise DataError(
            f"prepared file {folder / problem['file']}", problem["reason"], f"remove {folder} and prepare again"
        )


def _check_locally(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each missing or damaged file with the reason."""
    # Hashing releases the GIL, so threads verify files in parallel.
    with ThreadPoolExecutor() as threads:
        yield from (row for row in threads.map(partial(_check_file, folder=folder), rows) if row["reason"])


def _check_on_cluster(rows: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield one missing or damaged file with the reason, if there is any."""
    files = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // FILES_PER_TASK))
    files.context.enable_progress_bars = False
    # One problem is enough for the error, so the other files need not be read.
    yield from files.map(partial(_check_file, folder=folder)).filter(lambda row: row["reason"] != "").take(1)


def _check_file(row: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    return {"file": row["file"], "reason": file_problem(folder / row["file"], row["sha256"]) or ""}


def file_problem(path: Path, sha256: str) -> str | None:
    """Return the reason why a file does not have the content of this SHA-256, or None if it has."""
    if not path.is_file():
        return "it is missing"
    return None if describe_file(path).sha256 == sha256 else "its content is not what was written"
