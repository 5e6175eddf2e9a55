"""The input of a batch inference: finds the file, and checks all of its rows before a job starts."""

from typing import Any, NamedTuple

from mhmoe_ray.data.sources.items import BadLine, RawFile
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.errors import DataError
from mhmoe_ray.serving.batch.formats import FORMATS, SourceFile
from mhmoe_ray.serving.batch.rows import MESSAGES, parse_row, taken_column
from mhmoe_ray.spec import formats
from mhmoe_ray.storage import explain_error


def open_input(path: str) -> SourceFile:
    """Find an input file, and its format by its suffix; anything but one file of a known suffix is a DataError."""
    subject, name = f"input {path}", path.partition("?")[0]
    storage = Storage(path)
    try:
        files = storage.list_files().files
    except FileNotFoundError as e:
        raise DataError(subject, "there is no such file", "correct the path of the input") from e
    except OSError as e:
        raise DataError(subject, *explain_error(e, "correct the path of the input")) from e
    if len(files) != 1 or not name.endswith(files[0].path.rpartition("/")[2]):
        raise DataError(subject, "it is not a single file", "name one file of JSON lines or Parquet")
    for format_name in FORMATS:
        if name.endswith(formats.FORMATS[format_name].suffixes):
            return SourceFile(storage, RawFile("", files[0].path, files[0].size, format_name), format_name)
    suffixes = ", ".join(suffix for format_name in FORMATS for suffix in formats.FORMATS[format_name].suffixes)
    raise DataError(subject, "its suffix is not one of JSON lines or Parquet", f"give it one of {suffixes}")


class CheckedRows(NamedTuple):
    """Result of a check of all rows of an input."""

    row_count: int
    first_chat: int | None
    """Number of the line or row with the first conversation, from 1; None if there is none."""


def check_rows(source: SourceFile, has_logprobs: bool) -> CheckedRows:
    """Check that each row of an input has a prompt or a conversation, and no key of an answer.

    An input without rows, or with bad ones, is a DataError, which names the first bad row and their number.
    """
    file_format = FORMATS[source.format]
    row_count, bad_count, first_chat = 0, 0, None
    first_problem: tuple[int, str] | None = None
    for row in file_format.read_rows(source, has_logprobs):
        row_count += 1
        problem: str | None
        if isinstance(row, BadLine):
            number, problem = row.line, row.message
        else:
            number, problem = row.number, _row_problem(row.value, has_logprobs)
            if first_chat is None and problem is None and row.value.get(MESSAGES) is not None:
                first_chat = number
        if problem:
            bad_count += 1
            first_problem = first_problem or (number, problem)
    if first_problem:
        number, problem = first_problem
        subject = f"{source.subject} {file_format.row_label} {number}"
        reason = f"{problem} ({bad_count:,} of {row_count:,} rows cannot be answered)"
        raise DataError(subject, reason, "correct or remove them; nothing was computed")
    if not row_count:
        raise DataError(source.subject, "it has no rows", "give a file with prompts")
    return CheckedRows(row_count, first_chat)


def _row_problem(value: Any, has_logprobs: bool) -> str | None:
    try:
        parse_row(value)
    except ValueError as e:
        return str(e)
    name = taken_column(value, has_logprobs)
    return f"its key {name!r} is one of those of an answer; rename it" if name else None
