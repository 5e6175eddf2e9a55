"""Readers of Parquet files and of Hugging Face's Arrow streams with columns of texts, images and classes.

Columns are checked before they are decoded, because pyarrow has crashed the process when it decoded damaged offsets. A
row is a document. In a damaged Parquet file, only the damaged row groups are lost; in an Arrow stream that
`save_to_disk` wrote, everything from the damaged batch on is lost.
"""

import itertools
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mhmoe_ray.data.sources.compression import MAX_INFLATION
from mhmoe_ray.data.sources.images import check_image, class_annotation, image_document
from mhmoe_ray.data.sources.items import BadLine, Document, Fault, RawFile, ReadSettings, Reason, Tally
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import SourceSpec
from mhmoe_ray.storage import short_message

# Few rows are decoded at a time, since a row can be a document of many megabytes.
ROWS_PER_BATCH = 32
# Decoded rows of a batch take about this many bytes at most, if a single row does not take more.
_BATCH_BYTES = 64 << 20
# Each batch of dictionary-encoded texts has the whole dictionary, but may have few bytes in a file for each row.
_ROWS_PER_DICTIONARY_BATCH = 1 << 20
# pyarrow reads this many bytes of a Parquet column at a time.
_BUFFER_BYTES = 1 << 20

PYARROW_ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, IndexError)
"""Exceptions that pyarrow raises for damaged files, as tests with random damage show."""


def open_parquet(storage: Storage, path: str) -> pq.ParquetFile:
    """Open a Parquet file for reading page by page in little memory, with checksums verified."""
    # With `pre_buffer`, pyarrow's default, a whole column of a row group would be in memory.
    file = storage.open_seekable(path)
    return pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)


def column_problem(schema: pa.Schema, column: str) -> str | None:
    """Return the reason why texts cannot be read from a column, or None."""
    if problem := _missing_column_problem(schema, column):
        return problem + ("; conversations need format chat" if "messages" in schema.names else "")
    column_type = _value_type(schema, column)
    return None if _is_string(column_type) else f"its column {column!r} holds {column_type}, not strings"


def _missing_column_problem(schema: pa.Schema, column: str) -> str | None:
    if column in schema.names:
        return None
    return f"it has no column {column!r}; it has {', '.join(map(repr, schema.names))}"


def _value_type(schema: pa.Schema, column: str) -> pa.DataType:
    """Return the type of a column's values, also if the column is dictionary-encoded."""
    column_type = schema.field(column).type
    return column_type.value_type if pa.types.is_dictionary(column_type) else column_type


def _is_string(data_type: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(data_type) or pa.types.is_large_string(data_type) or pa.types.is_string_view(data_type)
    )


def as_bytes(texts: pa.Array) -> pa.Array:
    """Return strings as bytes that are safe to decode; offsets or indices out of range are an ArrowInvalid."""
    if pa.types.is_dictionary(texts.type):
        texts.validate()
        # `from_arrays` checks that the indices point into the dictionary.
        return pa.DictionaryArray.from_arrays(texts.indices, as_bytes(texts.dictionary))
    texts = texts.cast(pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary())
    texts.validate(full=True)
    return texts


def texts_in(texts: pa.Array, limit: int) -> Iterator[str | Fault]:
    """Yield the text of each row of a column of strings, or a fault; one of more than `limit` bytes is a fault.

    Offsets or indices that point outside of the data raise ArrowInvalid.
    """
    contents, rows = as_bytes(texts), ROWS_PER_BATCH
    if pa.types.is_dictionary(contents.type):
        rows = _rows_of(pc.max(pc.binary_length(contents.dictionary)).as_py() or 0, rows)
    for start in range(0, len(contents), rows):
        batch = contents.slice(start, rows)
        batch = batch.dictionary_decode() if pa.types.is_dictionary(batch.type) else batch
        for length, content in zip(pc.binary_length(batch).to_pylist(), batch, strict=True):
            if length is None:
                yield Fault(Reason.NO_TEXT, "it is null")
            elif length > limit:
                yield Fault(Reason.TOO_LONG)
            else:
                try:
                    yield content.as_py().decode()
                except UnicodeDecodeError as e:
                    yield Fault(Reason.NOT_UTF8, f"byte {e.start + 1} of the text")


def _rows_of(row_bytes: int, most_rows: int) -> int:
    """Return the number of rows of `row_bytes` decoded bytes to hold at a time, at least 1."""
    return max(1, min(most_rows, _BATCH_BYTES // max(1, row_bytes)))


class ColumnError(Exception):
    """Error for a file that lacks a column that its source reads; its message is the reason."""


_TEXT_COLUMN, _CLASS_COLUMN = "text", "label"


class _RowReader:
    """Reader that turns the rows of a Parquet file or a Hugging Face dataset into documents.

    A column that the source reads and that is missing or has a wrong type is a ColumnError.
    """

    def __init__(self, source: SourceSpec, settings: ReadSettings, schema: pa.Schema, path: str) -> None:
        self._columns, self._settings, self._path = source.sample_columns, settings, path
        self._text_column = (source.text_field or _TEXT_COLUMN) if "text" in self._columns else None
        if source.image_column is not None and (problem := image_column_problem(schema, source.image_column)):
            raise ColumnError(problem)
        # The first of these columns that the file has is read. The file may have none of them, because a source of
        # texts needs no images.
        image_columns = (name for name in settings.image_columns if not image_column_problem(schema, name))
        self._image_column = next(image_columns, None)
        if self._text_column is not None and (problem := column_problem(schema, self._text_column)):
            raise ColumnError(problem)
        self._class_column = (source.class_field or _CLASS_COLUMN) if "class" in self._columns else None
        self._class_names: list[str] | None = None
        if self._class_column is not None:
            if problem := class_column_problem(schema, self._class_column):
                raise ColumnError(problem)
            self._class_names = label_names(schema, self._class_column)

    @property
    def columns(self) -> list[str]:
        """Columns of texts, images and classes that must be read from the file."""
        names = (self._text_column, self._image_column, self._class_column)
        return [name for name in names if name is not None]

    def items_in(self, batch: pa.RecordBatch, first_row: int) -> Iterator[Document | BadLine]:
        """Yield each row of a batch as a `Document` or a `BadLine`; `first_row` counts from 0 within the file."""
        limit, length = self._settings.document_bytes, len(batch)
        captions: Iterable[str | Fault | None] = itertools.repeat(None, length)
        images: Iterable[bytes | Fault | None] = itertools.repeat(None, length)
        annotations: Iterable[bytes | Fault | None] = itertools.repeat(None, length)
        if self._text_column is not None:
            captions = texts_in(batch.column(self._text_column), limit)
        if self._image_column is not None:
            images = image_bytes(batch.column(self._image_column), limit)
        if self._class_column is not None:
            annotations = map(class_annotation, classes_in(batch.column(self._class_column), self._class_names, limit))
        rows = zip(captions, images, annotations, strict=True)
        for line, (caption, image, annotation) in enumerate(rows, start=first_row + 1):
            checked_image = check_image(image, self._settings) if "image" in self._columns else image
            yield image_document(self._path, line, "", checked_image, caption, self._columns, annotation=annotation)


def image_column_problem(schema: pa.Schema, column: str) -> str | None:
    """Return the reason why images cannot be read from a column, or None."""
    if problem := _missing_column_problem(schema, column):
        return problem + ("; download the images with img2dataset first" if {"url", "URL"} & {*schema.names} else "")
    column_type = schema.field(column).type
    if pa.types.is_string(column_type) or pa.types.is_large_string(column_type):
        return f"its column {column!r} holds {column_type}, not images: download them with img2dataset first"
    if pa.types.is_struct(column_type) and column_type.get_field_index("bytes") >= 0:
        column_type = column_type.field("bytes").type
    return None if _is_binary(column_type) else f"its column {column!r} holds {column_type}, not images"


def _is_binary(data_type: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type) or pa.types.is_binary_view(data_type)
    )


def image_bytes(images: pa.Array, limit: int) -> Iterator[bytes | Fault]:
    """Yield each row's image file from a column of bytes, or of structures with the field `bytes`, or else a fault.

    An image of more than `limit` bytes is a fault. Offsets that point outside of the data raise ArrowInvalid.
    """
    reason = "it is null"
    if pa.types.is_struct(images.type):
        images.validate()
        images = images.flatten()[images.type.get_field_index("bytes")]
        reason = "its bytes are null: only the path of a file may be stored"
    images.validate(full=True)
    for image in images:
        # The buffer is a view, so an image that is too large is not copied.
        buffer = image.as_buffer()
        if buffer is None:
            yield Fault(Reason.NO_IMAGE, reason)
        else:
            yield Fault(Reason.TOO_LONG, f"{buffer.size:,} bytes") if buffer.size > limit else buffer.to_pybytes()


def class_column_problem(schema: pa.Schema, column: str) -> str | None:
    """Return the reason why classes cannot be read from a column, which needs texts or integers, or None."""
    if problem := _missing_column_problem(schema, column):
        return problem
    column_type = _value_type(schema, column)
    if _is_string(column_type) or pa.types.is_integer(column_type):
        return None
    return f"its column {column!r} holds {column_type}, not classes"


def label_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the class names that Hugging Face stored in the schema for an integer column, or None."""
    try:
        tree = orjson.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = tree["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def classes_in(classes: pa.Array, names: list[str] | None, limit: int) -> Iterator[str | Fault]:
    """Yield the class of each row of a column that `class_column_problem` accepts, or the reason why the row has none.

    Integers are indices into `names`, or the names themselves if that is None. A name of more than `limit` bytes is a
    fault. Offsets or indices that point outside of the data raise ArrowInvalid.
    """
    value_type = classes.type.value_type if pa.types.is_dictionary(classes.type) else classes.type
    if _is_string(value_type):
        contents = as_bytes(classes)
    else:
        classes.validate(full=True)
        contents = classes
    for content in contents:
        value = content.as_py()
        if value is None:
            yield Fault(Reason.NO_CLASS, "it is null")
        elif isinstance(value, int):
            if names is None:
                yield str(value)
            elif 0 <= value < len(names):
                yield names[value]
            else:
                yield Fault(Reason.NO_CLASS, f"{value} is the number of none of its {len(names):,} classes")
        elif len(value) > limit:
            yield Fault(Reason.TOO_LONG, f"{len(value):,} bytes in its class")
        else:
            try:
                yield value.decode()
            except UnicodeDecodeError as e:
                yield Fault(Reason.NOT_UTF8, f"byte {e.start + 1} of the class")


# The start of a page's header in thrift's compact protocol: its type, then its decoded size.
_DICTIONARY_PAGE = re.compile(rb"\x15\x04\x15([\x80-\xff]{0,4}[\x00-\x7f])")


def rows_per_batch(
    table: pq.ParquetFile, stream: pa.NativeFile, index: int, columns: Collection[str], most_rows: int = ROWS_PER_BATCH
) -> int:
    """Return the number of rows of a row group to decode at a time, so that a batch has a bounded size.

    A dictionary stores a value once for many rows, so a row may be as large as the dictionary. Columns that unpack to
    far more than their size in the file are a ValueError.
    """
    # If a column's metadata is damaged, this raises an error, while `column` below would end the process.
    next(table.iter_batches(1, [index], list(columns), use_threads=False), None)
    row_bytes, group = 0, table.metadata.row_group(index)
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema in columns or chunk.path_in_schema.partition(".")[0] in columns:
            offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
            stream.seek(min(offset for offset in offsets if offset is not None))
            page = _DICTIONARY_PAGE.match(stream.read(8))
            dictionary_bytes = _varint(page[1]) // 2 if page else 0
            decoded_bytes = max(chunk.total_uncompressed_size, dictionary_bytes)
            if decoded_bytes > max(_BATCH_BYTES, MAX_INFLATION * chunk.total_compressed_size):
                raise ValueError(f"a column unpacks to {decoded_bytes:,} bytes, {MAX_INFLATION} times its size")
            # A row with a list has several values of the column.
            values_per_row = -(-chunk.num_values // max(1, group.num_rows))
            row_bytes += max(decoded_bytes // max(1, group.num_rows), dictionary_bytes * values_per_row)
    if row_bytes > 8 * _BATCH_BYTES:
        raise ValueError(f"a row may have {row_bytes:,} bytes")
    return _rows_of(row_bytes, most_rows)


def _varint(content: bytes) -> int:
    return sum((byte & 127) << 7 * i for i, byte in enumerate(content))


BatchReader = Callable[[pa.RecordBatch, int], Iterator[Document | BadLine]]
"""Function that yields the documents in a batch, given the number of its first row within the file, from 0."""


def read_parquet(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the rows of a Parquet file as documents, and a `BadLine` for each damaged row group."""

    def open_reader(schema: pa.Schema) -> tuple[list[str], BatchReader]:
        row_reader = _RowReader(source, settings, schema, file.path)
        return row_reader.columns, row_reader.items_in

    return read_row_groups(storage, file, tally, open_reader)


def read_row_groups(
    storage: Storage, file: RawFile, tally: Tally, open_reader: Callable[[pa.Schema], tuple[list[str], BatchReader]]
) -> Iterator[Document | BadLine]:
    """Yield the documents and unreadable rows of a Parquet file, and a `BadLine` for each damaged row group.

    `open_reader` returns the columns to read and their reader, or raises ColumnError if the file lacks a column. Of the
    tally, only `bytes_read` is updated.
    """
    row = 0
    try:
        with open_parquet(storage, file.path) as table, storage.open_seekable(file.path) as stream:
            try:
                columns, read_batch = open_reader(table.schema_arrow)
            except ColumnError as e:
                yield BadLine(file.path, 1, Reason.PART_LOST, str(e))
                return
            in_dictionary = all(pa.types.is_dictionary(table.schema_arrow.field(column).type) for column in columns)
            total = max(1, table.metadata.num_rows)
            for group in range(table.num_row_groups):
                group_start, row = row, row + table.metadata.row_group(group).num_rows
                next_row = group_start
                # Small batches would decode a dictionary again and again. Other batches are small, because images could
                # take gigabytes.
                try:
                    batch_rows = rows_per_batch(table, stream, group, columns)
                    if in_dictionary:
                        batch_rows = _ROWS_PER_DICTIONARY_BATCH
                    for batch in table.iter_batches(batch_rows, [group], columns, use_threads=False):
                        yield from read_batch(batch, next_row)
                        next_row += len(batch)
                    if next_row != row:
                        raise ValueError(f"{next_row - group_start:,} of {row - group_start:,} rows were read")
                except PYARROW_ERRORS as e:
                    yield BadLine(
                        file.path,
                        next_row + 1,
                        Reason.PART_LOST,
                        f"rows {next_row + 1:,} to {row:,}: {short_message(e)}",
                    )
                tally.bytes_read += file.size * row // total - file.size * group_start // total
    except PYARROW_ERRORS as e:
        yield BadLine(file.path, row + 1, Reason.PART_LOST, short_message(e))


_END_OF_STREAM = struct.pack("<Ii", 0xFFFFFFFF, 0)


def read_huggingface(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the rows of an Arrow stream of `save_to_disk` as documents; at damage, end with a `BadLine`."""
    row = 0
    try:
        with storage.open_seekable(file.path) as stream:
            stream.seek(max(0, stream.size() - len(_END_OF_STREAM)))
            # The mark at the end of the stream is checked here, because pyarrow does not report a stream that is cut
            # off between two batches.
            is_cut_off = stream.read() != _END_OF_STREAM
            stream.seek(0)
            with pa.ipc.open_stream(stream) as batches:
                try:
                    row_reader = _RowReader(source, settings, batches.schema, file.path)
                except ColumnError as e:
                    yield BadLine(file.path, 1, Reason.PART_LOST, str(e))
                    return
                for batch in batches:
                    yield from row_reader.items_in(batch, row)
                    row += len(batch)
                    tally.bytes_read = stream.tell()
        if is_cut_off:
            yield BadLine(file.path, row + 1, Reason.PART_LOST, "its end is cut off")
    except PYARROW_ERRORS as e:
        yield BadLine(file.path, row + 1, Reason.PART_LOST, short_message(e))
