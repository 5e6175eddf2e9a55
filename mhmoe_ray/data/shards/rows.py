"""Shards of samples with images, for encoders and vision models: writing and reading their rows.

A sample of an encoder has the columns `tokens`, T tokens of 2 or 4 bytes (the start token, a text and padding, or
padding only), and `image`, the source's unchanged image file or empty. Images are dictionary-encoded, so a shard stores
an image with many captions once. A sample of a vision model has `image` and `annotation` (data/images/annotations.py).
A shard is a memory-mapped Arrow file of one batch without nulls.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mhmoe_ray.data.shards.columns import TOKENS, token_dtype
from mhmoe_ray.data.shards.files import OPEN_SHARDS
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.storage import replace_file

IMAGE, ANNOTATION = "image", "annotation"


def row_batch(
    tokens: np.ndarray | None, images: Sequence[bytes], annotations: Sequence[bytes] | None = None
) -> pa.RecordBatch:
    """Return one or more samples as a batch with the columns of a shard.

    Tokens are (rows, T) in the folder's dtype, or None for a vision model; an image is empty if its row has none.
    """
    columns: dict[str, pa.Array] = {}
    if tokens is not None:
        stored_tokens = np.ascontiguousarray(tokens).view(np.uint8)
        token_type = pa.binary(stored_tokens.shape[1])
        columns[TOKENS] = pa.FixedSizeBinaryArray.from_buffers(
            token_type, len(tokens), [None, pa.py_buffer(stored_tokens)]
        )
    columns[IMAGE] = pa.array(images, pa.large_binary()).dictionary_encode()
    if annotations is not None:
        columns[ANNOTATION] = pa.array(annotations, pa.large_binary())
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    return pa.record_batch([*columns.values()], schema=pa.schema(fields))


def join_batches(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Return the rows of one or more batches as one batch."""

    def join(name: str) -> pa.Array:
        # A batch may be a slice of a larger one. If Arrow wrote the slice itself, the padding between the columns of
        # the file would have bytes of the rows after the slice. `concat_arrays` copies only the rows of the slice, so
        # that the bytes of a shard depend on its rows alone.
        columns = [batch.column(name) for batch in batches]
        # A column of images has a dictionary. `concat_arrays` joins the dictionaries and keeps only one of equal
        # images.
        return pa.concat_arrays([_used_images(column) for column in columns] if name == IMAGE else columns)

    schema = batches[0].schema
    return pa.record_batch([join(name) for name in schema.names], schema=schema)


def row_bytes(row: pa.RecordBatch) -> int:
    """Return the bytes of the values of one sample, a batch of one row."""
    # Arrow's `nbytes` counts the images of the whole batch for each slice of it, so the image is counted separately.
    other_columns = sum(row.column(name).nbytes for name in row.schema.names if name != IMAGE)
    return int(other_columns) + len(row.column(IMAGE)[0].as_py())


def _used_images(images: pa.DictionaryArray) -> pa.DictionaryArray:
    """Return a column whose dictionary has only the images that its rows use, in their order."""
    used_numbers = pc.unique(images.indices)
    indices = pc.index_in(images.indices, used_numbers).cast(images.indices.type)
    return pa.DictionaryArray.from_arrays(indices, images.dictionary.take(used_numbers))


def file_content(batch: pa.RecordBatch) -> memoryview:
    """Return the content of an Arrow file of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def write_row_shard(folder: Path, file: str, batch: pa.RecordBatch) -> Shard:
    """Write one shard file atomically, and return its manifest entry."""
    content = file_content(batch)
    replace_file(folder / file, content)
    return Shard(file=file, rows=len(batch), sha256=hashlib.sha256(content).hexdigest())


def map_rows(path: Path | str) -> pa.RecordBatch:
    """Return the rows of an Arrow file as a memory-mapped batch."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).get_batch(0)


_map_shard = lru_cache(maxsize=OPEN_SHARDS)(map_rows)


def tokens_of(batch: pa.RecordBatch, token_bytes: int) -> np.ndarray:
    """Return the tokens of a batch, (rows, T), as a view."""
    column = batch.column(TOKENS)
    length = column.type.byte_width // token_bytes
    all_tokens = np.frombuffer(column.buffers()[1], token_dtype(token_bytes)).reshape(-1, length)
    # The buffer of a slice has the rows before and after it, too.
    return all_tokens[column.offset : column.offset + len(column)]


class StoredValues(Sequence[bytes]):
    """Stored images or annotations of some rows, which are read when they are accessed."""

    def __init__(self, reader: "RowReader", column: str, numbers: np.ndarray) -> None:
        self._reader, self._column, self._numbers = reader, column, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        values = self._reader.read_values(self._column, np.atleast_1d(self._numbers[index]))
        return values if isinstance(index, slice) else values[0]


class RowReader:
    """Random access to the rows of a list of shards."""

    def __init__(self, folder: Path, shards: Sequence[Shard], token_bytes: int) -> None:
        self._paths = [str(folder / s.file) for s in shards]
        self._starts = np.cumsum([0, *(s.rows for s in shards)])
        self._token_bytes = token_bytes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
        """Return tokens (rows, T) and image files of one or more rows, numbered across all shards from 0."""
        return self.read_tokens(numbers), self.read_values(IMAGE, numbers)

    def read_values(self, column: str, numbers: np.ndarray) -> list[bytes]:
        """Return the `image` or `annotation` of rows; `numbers` may be empty."""
        shard_of, row_of = self._locate(numbers)
        return [
            _map_shard(self._paths[shard]).column(column)[int(row)].as_py()
            for shard, row in zip(shard_of, row_of, strict=True)
        ]

    def image_numbers(self) -> tuple[np.ndarray, int]:
        """Return each row's index among the stored images, and how many are stored, without reading any image.

        Equal images have different indices only in different shards.
        """
        numbers, count = [np.empty(0, np.int64)], 0
        for path in self._paths:
            column = _map_shard(path).column(IMAGE)
            numbers.append(count + column.indices.to_numpy().astype(np.int64))
            count += len(column.dictionary)
        return np.concatenate(numbers), count

    def read_tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Return the tokens (rows, T) of one or more rows without reading their images."""
        shard_of, row_of = self._locate(numbers)
        tokens: np.ndarray | None = None
        for shard in np.unique(shard_of):
            indices = np.flatnonzero(shard_of == shard)
            rows = tokens_of(_map_shard(self._paths[shard]), self._token_bytes)
            if tokens is None:
                tokens = np.empty((len(numbers), rows.shape[1]), rows.dtype)
            tokens[indices] = rows[row_of[indices]]
        assert tokens is not None, "a caller asks for at least one row"
        return tokens

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        return shard_of, numbers - self._starts[shard_of]
