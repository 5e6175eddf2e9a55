"""The formats of inputs and outputs: JSON lines, plain or compressed, and Parquet.

A chunk of the input is an Arrow table with one row per input row. JSON lines have one column with the raw lines, so
that the output repeats them to the last digit of a number.
"""

import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from mhmoe_ray.data.sources.columns import PYARROW_ERRORS, open_parquet
from mhmoe_ray.data.sources.items import BadLine, RawFile, Tally
from mhmoe_ray.data.sources.records import decode_json, read_records
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.errors import DataError
from mhmoe_ray.serving.batch.request import InputFormat
from mhmoe_ray.serving.batch.rows import (
    MESSAGES,
    PROMPT,
    AnswerCounts,
    RowAnswer,
    answer_columns,
    taken_column,
)
from mhmoe_ray.storage import short_message

MAX_LINE_BYTES = 1 << 30
"""Largest size of a line in bytes, so that a file of another format does not fill the memory."""
_LINE = "line"


class SourceFile(NamedTuple):
    """The input file of a batch inference, in its storage."""

    storage: Storage
    file: RawFile
    format: InputFormat

    @property
    def subject(self) -> str:
        """Name of the input file in error messages."""
        return f"input {self.file.path}"

    def damage_error(self, reason: str) -> DataError:
        """Return the error for a damaged input file."""
        return DataError(self.subject, reason, "repair it, then give the command again")


class NumberedRow(NamedTuple):
    """Row of the input file, with its number."""

    number: int
    """Number of the line or row in the file, from 1."""
    value: Any
    """Decoded line of JSON, or the columns of a Parquet row that hold its prompt."""


class Format(Protocol):
    """Interface of the reader and writer of a file format, for inputs and outputs."""

    suffix: ClassVar[str]
    """Suffix of output files in this format."""
    row_label: ClassVar[str]
    """Word for a row of this format in messages: line or row."""

    def read_rows(self, source: SourceFile, has_logprobs: bool) -> Iterator[NumberedRow | BadLine]:
        """Yield the rows of the input, and the lines that cannot be read.

        Args:
            source: the input file.
            has_logprobs: whether answers will have a column with the scores of their tokens. A Parquet file must not
                have a column with the name of an answer's column.

        Raises:
            DataError: the file as a whole cannot be read.
        """
        ...

    def read_tables(self, source: SourceFile, rows: int) -> Iterator[pa.Table]:
        """Yield the rows of the input in tables of `rows` rows each; the last one may have fewer.

        Raises:
            DataError: the file cannot be read.
        """
        ...

    def table_rows(self, table: pa.Table) -> list[Any]:
        """Return the decoded rows of a table that `read_tables` yielded, in the form that `parse_row` takes."""
        ...

    def encode(self, table: pa.Table, answers: Sequence[RowAnswer], has_logprobs: bool) -> bytes:
        """Return the content of an output file: the rows of a table that `read_tables` yielded, with their answers."""
        ...

    def count(self, content: bytes) -> AnswerCounts:
        """Count the answers and tokens in the content of an output file."""
        ...


class JsonLines:
    """Reader and writer of JSON lines. Blank lines do not count as rows. Inputs may be compressed; outputs are not."""

    suffix: ClassVar[str] = ".jsonl"
    row_label: ClassVar[str] = "line"

    def read_rows(self, source: SourceFile, has_logprobs: bool) -> Iterator[NumberedRow | BadLine]:
        for record in read_records(source.storage, source.file, MAX_LINE_BYTES, Tally()):
            yield record if isinstance(record, BadLine) else NumberedRow(record.line, record.fields)

    def read_tables(self, source: SourceFile, rows: int) -> Iterator[pa.Table]:
        lines = []
        for record in read_records(source.storage, source.file, MAX_LINE_BYTES, Tally()):
            if isinstance(record, BadLine):
                raise source.damage_error(record.message)
            lines.append(record.content)
            if len(lines) == rows:
                yield _line_table(lines)
                lines = []
        if lines:
            yield _line_table(lines)

    def table_rows(self, table: pa.Table) -> list[Any]:
        return [decode_json(line) for line in table[_LINE].to_pylist()]

    def encode(self, table: pa.Table, answers: Sequence[RowAnswer], has_logprobs: bool) -> bytes:
        """Return the rows of a table as lines of JSON, which end with the keys of their answers."""
        columns = answer_columns(has_logprobs)
        return b"".join(
            _add_keys(line, {name: getattr(answer, name) for name in columns})
            for line, answer in zip(table[_LINE].to_pylist(), answers, strict=True)
        )

    def count(self, content: bytes) -> AnswerCounts:
        return AnswerCounts.of_rows([decode_json(line) for line in content.split(b"\n") if line])


def _line_table(lines: list[bytes]) -> pa.Table:
    return pa.table({_LINE: pa.array(lines, pa.large_binary())})


def _add_keys(line: bytes, keys: dict[str, Any]) -> bytes:
    """Add keys and a newline to a line, which is a JSON object with at least one key."""
    return line.strip().removesuffix(b"}").rstrip() + b", " + orjson.dumps(keys).removeprefix(b"{") + b"\n"


_LOGPROB = [("token", pa.string()), ("logprob", pa.float64()), ("bytes", pa.list_(pa.uint8()))]
_ANSWER_TYPES: dict[str, pa.DataType] = {
    "text": pa.large_string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "tokens": pa.int64(),
    "error": pa.string(),
    "logprobs": pa.list_(pa.struct([*_LOGPROB, ("top_logprobs", pa.list_(pa.struct(_LOGPROB)))])),
}


class Parquet:
    """Reader and writer of Parquet files."""

    suffix: ClassVar[str] = ".parquet"
    row_label: ClassVar[str] = "row"

    def read_rows(self, source: SourceFile, has_logprobs: bool) -> Iterator[NumberedRow | BadLine]:
        try:
            with open_parquet(source.storage, source.file.path) as parquet_file:
                names = parquet_file.schema_arrow.names
        except PYARROW_ERRORS as e:
            raise source.damage_error(short_message(e)) from e
        _check_columns(source, names, has_logprobs)
        # Other columns may be large, and need not be read to check the rows.
        columns = [name for name in (PROMPT, MESSAGES) if name in names]
        rows = (row for table in _read_parquet(source, 1024, columns) for row in self.table_rows(table))
        yield from map(NumberedRow, itertools.count(1), rows)

    def read_tables(self, source: SourceFile, rows: int) -> Iterator[pa.Table]:
        return _read_parquet(source, rows, None)

    def table_rows(self, table: pa.Table) -> list[Any]:
        """Return the columns of each row that hold its prompt, by name."""
        rows: list[Any] = table.select([name for name in (PROMPT, MESSAGES) if name in table.column_names]).to_pylist()
        return rows

    def encode(self, table: pa.Table, answers: Sequence[RowAnswer], has_logprobs: bool) -> bytes:
        for name in answer_columns(has_logprobs):
            values = [getattr(answer, name) for answer in answers]
            table = table.append_column(name, pa.array(values, _ANSWER_TYPES[name]))
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()

    def count(self, content: bytes) -> AnswerCounts:
        columns = ["error", "prompt_tokens", "tokens"]
        return AnswerCounts.of_rows(pq.read_table(io.BytesIO(content), columns=columns).to_pylist())


def _read_parquet(source: SourceFile, rows: int, columns: list[str] | None) -> Iterator[pa.Table]:
    """Yield the rows of a Parquet file in tables of `rows` rows; the last one may have fewer.

    With None as `columns`, all columns are read. A damaged file is a DataError.
    """
    try:
        with open_parquet(source.storage, source.file.path) as parquet_file:
            batches: list[pa.RecordBatch] = []
            for batch in parquet_file.iter_batches(rows, columns=columns, use_threads=False):
                # Damaged offsets would crash the process when values are decoded.
                batch.validate(full=True)
                batches.append(batch)
                # Batches may be smaller than requested, for example at the end of a row group.
                if sum(map(len, batches)) >= rows:
                    table = pa.Table.from_batches(batches)
                    yield table.slice(0, rows)
                    batches = table.slice(rows).to_batches()
            if any(map(len, batches)):
                yield pa.Table.from_batches(batches)
    except PYARROW_ERRORS as e:
        raise source.damage_error(short_message(e)) from e


def _check_columns(source: SourceFile, names: Sequence[str], has_logprobs: bool) -> None:
    """Raise DataError if an input lacks prompts and messages, or has a column named like an answer's."""
    if PROMPT not in names and MESSAGES not in names:
        reason = f"it has no column {PROMPT!r} or {MESSAGES!r}; it has {', '.join(map(repr, names))}"
        raise DataError(source.subject, reason, "rename the column of the prompts")
    if name := taken_column(names, has_logprobs):
        raise DataError(source.subject, f"its column {name!r} has the name of a column of answers", "rename it")


FORMATS: dict[InputFormat, Format] = {"jsonl": JsonLines(), "parquet": Parquet()}
