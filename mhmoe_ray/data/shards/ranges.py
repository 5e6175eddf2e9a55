"""Single rows of a shard on an object store, read by ranges of bytes and checked by the row's CRC32.

The preparation writes the CRC32 of each row beside the shard, as little-endian 32-bit integers in `<shard>.crc32`. Only
columns of equally long rows can be read so.
"""

import mmap
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mhmoe_ray.data.shards.cache import ATTEMPTS, damage_error
from mhmoe_ray.data.shards.columns import COLUMNS
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import STORE_CONNECTIONS, Location, ObjectPath, read_file, replace_file, retry_reads

CHECKS_SUFFIX = ".crc32"
END_BYTES = 1024
"""Bytes at both ends of a shard that are read when it is opened: its schema and its footer have up to 480."""
_reader_pool: ThreadPoolExecutor | None = None


def checks_file(shard: Location) -> Location:
    """Return the path of the CRC32s of a shard's rows."""
    return shard.parent / f"{shard.name}{CHECKS_SUFFIX}"


def write_checks(shard: Location, columns: Mapping[str, np.ndarray]) -> None:
    """Write the CRC32s of a shard's rows, whose columns are arrays (rows, bytes)."""
    replace_file(checks_file(shard), _row_checks(columns).tobytes())


def _row_checks(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.array([zlib.crc32(row) for row in np.concatenate([*columns.values()], axis=1)], "<u4")


class ColumnPlace(NamedTuple):
    """Place of a column of equally long rows in a shard."""

    offset: int
    """Position of the first row in the file."""
    width: int
    """Bytes of a row."""


class RangedShard:
    """A shard of which single rows are read."""

    def __init__(self, source: ObjectPath) -> None:
        self._source = source
        self._file: pa.NativeFile = retry_reads(source.open)
        self._read_description()

    def _read_description(self) -> None:
        """Read the places of the columns and the CRC32s, and repeat this if they arrive damaged."""
        for attempts_left in reversed(range(ATTEMPTS)):
            try:
                row_count, self._columns = retry_reads(self._read_layout)
                self._check_R = self._read_checks(row_count)
            except DataError:
                if not attempts_left:
                    raise
            else:
                break

    def _read_checks(self, row_count: int) -> np.ndarray | None:
        """Return the CRC32 of each row; None if the shard has none, as `verify_shards` then checks it as a whole."""
        try:
            content = retry_reads(lambda: read_file(checks_file(self._source)))
        except FileNotFoundError:
            return None
        if len(content) != 4 * row_count:
            raise damage_error(checks_file(self._source))
        return np.frombuffer(content, "<u4")

    def _read_layout(self) -> tuple[int, dict[str, ColumnPlace]]:
        """Return the number of rows, and the place of each column, all of them within the file."""
        size = self._file.size()
        # Arrow computes the places of columns from the ends of the file. The pages between them are never written, so
        # they take no memory.
        content = mmap.mmap(-1, size)
        for start in (0, max(0, size - END_BYTES)):
            data = self._file.read_at(min(END_BYTES, size), start)
            content[start : start + len(data)] = data
        buffer = pa.py_buffer(content)
        try:
            batch = pa.ipc.open_file(buffer).get_batch(0)
            columns = {
                name: ColumnPlace(column.buffers()[1].address - buffer.address, column.type.byte_width)
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
        except (pa.ArrowException, OSError, ValueError, IndexError) as e:
            raise damage_error(self._source) from e
        are_inside = all(0 <= column.offset <= size - len(batch) * column.width for column in columns.values())
        if not (columns and are_inside and columns.keys() <= COLUMNS.keys()):
            raise damage_error(self._source)
        return len(batch), columns

    @property
    def has_checks(self) -> bool:
        """True if the shard has the CRC32s of its rows."""
        return self._check_R is not None

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows by column, (numbers, bytes); rows with a wrong CRC32 are a DataError."""
        unique_numbers, inverse = np.unique(numbers, return_inverse=True)
        for _ in range(ATTEMPTS):
            columns = {name: self._read_column(column, unique_numbers) for name, column in self._columns.items()}
            if self._check_R is None or np.array_equal(_row_checks(columns), self._check_R[unique_numbers]):
                return {name: column[inverse] for name, column in columns.items()}
            # The places of the columns or the CRC32s may be what arrived damaged.
            self._read_description()
        raise damage_error(self._source)

    def _read_column(self, column: ColumnPlace, numbers: np.ndarray) -> np.ndarray:
        offset, width = column
        # Neighbouring rows are read together.
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if len(numbers) else []

        def read_run(run: np.ndarray) -> bytes:
            start, length = offset + int(run[0]) * width, len(run) * width
            return retry_reads(lambda: _read_exactly(self._file, start, length))

        content = b"".join(_pool().map(read_run, runs))
        return np.frombuffer(content, np.uint8).reshape(len(numbers), width)


def _read_exactly(file: pa.NativeFile, start: int, length: int) -> bytes:
    data: bytes = file.read_at(length, start)
    if len(data) < length:
        raise OSError(f"a read of {length:,} bytes returned {len(data):,}")
    return data


def _pool() -> ThreadPoolExecutor:
    # The pool is made when it is first used, because importing this file must not start threads.
    global _reader_pool
    _reader_pool = _reader_pool or ThreadPoolExecutor(STORE_CONNECTIONS, thread_name_prefix="range")
    return _reader_pool
