"""Tables with a column of texts: Parquet files, and the Arrow streams that Hugging Face's `save_to_disk` leaves.

What cannot be read of a Parquet file is lost row group by row group; of a stream, from the damaged batch on. Texts are
checked and decoded here: pyarrow's own decoding of damaged offsets has ended the process.
"""

import struct
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.jsonl import unusable
from mhmoe_ray.data.sources.storage import Storage, one_line

ROWS = 32  # decoded at a time
_BUFFER = 1 << 20  # of a Parquet column
_END_OF_STREAM = struct.pack("<Ii", 0xFFFFFFFF, 0)

ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, IndexError)
"""All that pyarrow was seen to raise of damaged files."""


def read_parquet(
    storage: Storage, file: RawFile, column: str, limit: int, tally: Tally
) -> Iterator[Document | BadLine]:
    """The texts of a column of a Parquet file.

    Args:
        storage: where the file is.
        file: which one.
        column: its name.
        limit: of a text, in bytes.
        tally: whose `bytes_read` is kept up to date.
    """
    row = 0
    try:
        with open_parquet(storage, file.path) as table:
            problem = _no_texts(table.schema_arrow, column)
            if problem:
                yield BadLine(file.path, 1, Reason.LOST, problem)
                return
            total = max(1, table.metadata.num_rows)
            for group in range(table.num_row_groups):
                first, row = row, row + table.metadata.row_group(group).num_rows
                done = first
                try:
                    for batch in table.iter_batches(ROWS, [group], [column], use_threads=False):
                        yield from _documents(_as_bytes(batch.column(0)), file.path, done, limit)
                        done += len(batch)
                    if done != row:
                        raise ValueError(f"{done - first:,} of {row - first:,} rows are there")
                except ERRORS as e:
                    yield BadLine(file.path, done + 1, Reason.LOST, f"rows {done + 1:,} to {row:,}: {one_line(e)}")
                tally.bytes_read += file.size * row // total - file.size * first // total
    except ERRORS as e:
        yield BadLine(file.path, row + 1, Reason.LOST, one_line(e))


def open_parquet(storage: Storage, path: str) -> pq.ParquetFile:
    """To read page by page; pyarrow's default, pre_buffer, holds all that a row group has of a column."""
    file = storage.open_anywhere(path)
    return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


def read_stream(storage: Storage, file: RawFile, column: str, limit: int, tally: Tally) -> Iterator[Document | BadLine]:
    """The texts of a column of an Arrow stream file; arguments as of `read_parquet`."""
    row = 0
    try:
        with storage.open_anywhere(file.path) as stream:
            stream.seek(max(0, stream.size() - len(_END_OF_STREAM)))
            cut = stream.read() != _END_OF_STREAM
            stream.seek(0)
            with pa.ipc.open_stream(stream) as batches:
                problem = _no_texts(batches.schema, column)
                if problem:
                    yield BadLine(file.path, 1, Reason.LOST, problem)
                    return
                for batch in batches:
                    texts = _as_bytes(batch.column(column))
                    for start in range(0, len(texts), ROWS):
                        yield from _documents(texts.slice(start, ROWS), file.path, row + start, limit)
                    row += len(batch)
                    tally.bytes_read = stream.tell()
        if cut:
            yield BadLine(file.path, row + 1, Reason.LOST, "its end is cut off")
    except ERRORS as e:
        yield BadLine(file.path, row + 1, Reason.LOST, one_line(e))


def _no_texts(schema: pa.Schema, column: str) -> str | None:
    """Why this column holds no texts."""
    if column not in schema.names:
        return f"it has no column {column!r}; it has {', '.join(map(repr, schema.names))}"
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return f"its column {column!r} holds {kind}, not strings"
    return None


def _as_bytes(texts: pa.Array) -> pa.Array:
    """Raises:
    ArrowInvalid: offsets point outside of the data.
    """
    if pa.types.is_dictionary(texts.type):
        texts.validate(full=True)
        texts = texts.dictionary_decode()
    texts = texts.cast(pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary())
    texts.validate(full=True)
    return texts


def _documents(texts: pa.Array, path: str, first: int, limit: int) -> Iterator[Document | BadLine]:
    """A few rows, the first of them of number `first` from 0."""
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
