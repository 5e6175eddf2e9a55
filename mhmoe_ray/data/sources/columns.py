"""Columns of texts in pyarrow's tables, checked and decoded: pyarrow's own decoding of damaged offsets has ended the
process."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mhmoe_ray.data.sources.items import BadLine, Document, Reason
from mhmoe_ray.data.sources.records import unusable
from mhmoe_ray.data.sources.storage import Storage

ROWS = 32  # decoded at a time
_BUFFER = 1 << 20  # of a Parquet column

ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, IndexError)
"""All that pyarrow was seen to raise of damaged files."""


def open_parquet(storage: Storage, path: str) -> pq.ParquetFile:
    """To read page by page; pyarrow's default, pre_buffer, holds all that a row group has of a column."""
    file = storage.open_anywhere(path)
    return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


def no_texts(schema: pa.Schema, column: str) -> str | None:
    """Why this column holds no texts."""
    if column not in schema.names:
        return f"it has no column {column!r}; it has {', '.join(map(repr, schema.names))}"
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return f"its column {column!r} holds {kind}, not strings"
    return None


def as_bytes(texts: pa.Array) -> pa.Array:
    """The same texts, safe to decode.

    Raises:
        ArrowInvalid: offsets or indices point outside of the data.
    """
    if pa.types.is_dictionary(texts.type):
        texts.validate()
        return pa.DictionaryArray.from_arrays(texts.indices, as_bytes(texts.dictionary))  # checks the indices
    texts = texts.cast(pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary())
    texts.validate(full=True)
    return texts


def documents_in(texts: pa.Array, path: str, first: int, limit: int) -> Iterator[Document | BadLine]:
    """Rows of `as_bytes`, the first of them of number `first` from 0."""
    for start in range(0, len(texts), ROWS):
        some = texts.slice(start, ROWS)
        some = some.dictionary_decode() if pa.types.is_dictionary(some.type) else some
        yield from _documents(some, path, first + start, limit)


def _documents(texts: pa.Array, path: str, first: int, limit: int) -> Iterator[Document | BadLine]:
    lengths = pc.binary_length(texts).to_pylist()
    for row, (length, text) in enumerate(zip(lengths, texts, strict=True), start=first + 1):
        if length is None:
            yield BadLine(path, row, Reason.NO_TEXT, "it is null")
        elif length > limit:
            yield BadLine(path, row, Reason.TOO_LONG)
        else:
            try:
                value = text.as_py().decode()
            except UnicodeDecodeError as e:
                yield BadLine(path, row, Reason.NOT_UTF8, f"byte {e.start + 1} of the text")
                continue
            reason = unusable(value)
            yield Document(value, row) if reason is None else BadLine(path, row, reason)
