"""Reading of text columns in pyarrow's tables, checked before decoding: Parquet files and Hugging Face's Arrow streams.

The check is needed because pyarrow's own decoding of damaged offsets has ended the process. A row is a document. In a
damaged Parquet file only the damaged row groups are lost; in a stream that `save_to_disk` wrote, everything from the
damaged batch on is lost.
"""

import struct
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.records import unusable
from mhmoe_ray.data.sources.storage import Storage, one_line
from mhmoe_ray.spec import SourceSpec

ROWS = 32  # decoded at a time
_BUFFER = 1 << 20  # of a Parquet column

ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, IndexError)
"""All exceptions that pyarrow was observed to raise for damaged files."""


def open_parquet(storage: Storage, path: str) -> pq.ParquetFile:
    """Open a Parquet file so that it is read page by page.

    pyarrow's default, `pre_buffer`, would hold all that a row group has of a column in memory.
    """
    file = storage.open_anywhere(path)
    return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


def no_texts(schema: pa.Schema, column: str) -> str | None:
    """Return the reason why a column holds no texts, or None if it holds texts."""
    if column not in schema.names:
        return f"it has no column {column!r}; it has {', '.join(map(repr, schema.names))}"
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return f"its column {column!r} holds {kind}, not strings"
    return None


def as_bytes(texts: pa.Array) -> pa.Array:
    """Return the same texts as bytes whose offsets and indices were checked, so that they are safe to decode.

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
    """Yield the documents in the result of `as_bytes`, row by row.

    Args:
        texts: the texts as bytes.
        path: the path of the file.
        first: the number of the first row within the file, from 0.
        limit: largest size of a document in bytes.
    """
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


def read_parquet(
    storage: Storage, file: RawFile, source: SourceSpec, limit: int, tally: Tally
) -> Iterator[Document | BadLine]:
    """Read a Parquet file; see `reading.Read`."""
    column = source.text_field or "text"
    row = 0
    try:
        with open_parquet(storage, file.path) as table:
            problem = no_texts(table.schema_arrow, column)
            if problem:
                yield BadLine(file.path, 1, Reason.LOST, problem)
                return
            in_dictionary = pa.types.is_dictionary(table.schema_arrow.field(column).type)
            total = max(1, table.metadata.num_rows)
            for group in range(table.num_row_groups):
                first, row = row, row + table.metadata.row_group(group).num_rows
                done = first
                rows = max(1, row - first) if in_dictionary else ROWS  # the dictionary comes whole with each batch
                try:
                    for batch in table.iter_batches(rows, [group], [column], use_threads=False):
                        yield from documents_in(as_bytes(batch.column(0)), file.path, done, limit)
                        done += len(batch)
                    if done != row:
                        raise ValueError(f"{done - first:,} of {row - first:,} rows are there")
                except ERRORS as e:
                    yield BadLine(file.path, done + 1, Reason.LOST, f"rows {done + 1:,} to {row:,}: {one_line(e)}")
                tally.bytes_read += file.size * row // total - file.size * first // total
    except ERRORS as e:
        yield BadLine(file.path, row + 1, Reason.LOST, one_line(e))


_END_OF_STREAM = struct.pack("<Ii", 0xFFFFFFFF, 0)


def read_huggingface(
    storage: Storage, file: RawFile, source: SourceSpec, limit: int, tally: Tally
) -> Iterator[Document | BadLine]:
    """Read an Arrow stream that Hugging Face's `save_to_disk` wrote; see `reading.Read`."""
    column = source.text_field or "text"
    row = 0
    try:
        with storage.open_anywhere(file.path) as stream:
            stream.seek(max(0, stream.size() - len(_END_OF_STREAM)))
            cut = stream.read() != _END_OF_STREAM
            stream.seek(0)
            with pa.ipc.open_stream(stream) as batches:
                problem = no_texts(batches.schema, column)
                if problem:
                    yield BadLine(file.path, 1, Reason.LOST, problem)
                    return
                for batch in batches:
                    yield from documents_in(as_bytes(batch.column(column)), file.path, row, limit)
                    row += len(batch)
                    tally.bytes_read = stream.tell()
        if cut:
            yield BadLine(file.path, row + 1, Reason.LOST, "its end is cut off")
    except ERRORS as e:
        yield BadLine(file.path, row + 1, Reason.LOST, one_line(e))
