"""Readers of text files, decompressed and read line by line: JSON lines and plain text.

JSON lines: a line is a document; blank lines are skipped. If orjson refuses a line, the standard library parses it
without its byte order mark, because it also accepts NaN and lone surrogates. A lone surrogate in the text itself still
makes the line unreadable.

Plain text: a file is a document, or each of its parts between delimiter lines is one, without byte order mark and last
line break; CR LF becomes LF. A document with a NUL byte is unreadable. Blank parts between delimiters are skipped;
without a delimiter, a blank file is unreadable.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import orjson

from mhmoe_ray.data.sources.compression import decompress
from mhmoe_ray.data.sources.items import BadLine, DamageError, Document, RawFile, ReadSettings, Reason, Tally
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import SourceSpec


def split_lines(chunks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Yield each line without its newline, and None in place of a line that is longer than `limit` bytes.

    If `chunks` raises DamageError, its `cut_off_line` is set to the beginning of the last line, unless that is too
    long.
    """
    # The pieces belong to a line that began in an earlier chunk. They are dropped when the line gets too long.
    pieces: list[bytes] = []
    length = 0
    try:
        for chunk in chunks:
            *full_lines, last_piece = chunk.split(b"\n")
            # Only the first full line of a chunk can continue the pieces of earlier chunks.
            if full_lines:
                length += len(full_lines[0])
                yield b"".join([*pieces, full_lines[0]]) if length <= limit else None
                for i in range(1, len(full_lines)):
                    yield full_lines[i] if len(full_lines[i]) <= limit else None
                pieces, length = [], 0
            if last_piece:
                length += len(last_piece)
                pieces.append(last_piece)
                if length > limit:
                    pieces.clear()
    except DamageError as damage:
        damage.cut_off_line = b"".join(pieces)
        raise
    if length:
        yield b"".join(pieces) if length <= limit else None


MAX_KEY_CHARACTERS = 40
BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """Parsed line: its number from 1, any JSON value, and its bytes without newline and byte order mark."""

    line: int
    fields: Any
    content: bytes


def read_records(storage: Storage, file: RawFile, limit: int, tally: Tally) -> Iterator[Record | BadLine]:
    """Yield the lines of a file of JSON lines, parsed or as a `BadLine`; skip blank lines.

    Only `tally.bytes_read` is updated. A line of more than `limit` bytes is unreadable. Damage raises no error: the
    last item is a `BadLine` for the rest.
    """
    number = 0
    try:
        for number, line in enumerate(split_lines(decompress(storage.chunks(file, tally), file.path), limit), start=1):
            if line is None:
                yield BadLine(file.path, number, Reason.TOO_LONG)
                continue
            try:
                fields = orjson.loads(line)
            except ValueError:
                record = _parse_leniently(file.path, number, line)
                if record is not None:
                    yield record
            else:
                yield Record(number, fields, line)
    except DamageError as damage:
        cut_record = _parse_leniently(file.path, number + 1, damage.cut_off_line)
        # A line that can be parsed is complete: only its newline was cut off.
        if isinstance(cut_record, Record):
            number += 1
            yield cut_record
        yield BadLine(file.path, number + 1, Reason.PART_LOST, damage.reason)


def decode_json(content: bytes) -> Any:
    """Parse JSON with NaN, infinities and lone surrogates; raise ValueError, or RecursionError if it is too deep."""
    try:
        return orjson.loads(content)
    except ValueError:
        # The standard library accepts NaN and lone surrogates, which other programs write.
        return json.loads(content)


def _parse_leniently(path: str, number: int, line: bytes) -> Record | BadLine | None:
    """Parse a line with the standard library after orjson refused it; return None for a blank line."""
    content = line.removeprefix(BOM)
    if not content.strip():
        return None
    # NUL bytes are reported separately, because they mean a hole that a crash left in the file, or UTF-16.
    if b"\0" in content:
        return BadLine(path, number, Reason.NUL_BYTES)
    try:
        return Record(number, json.loads(content.decode()), content)
    except UnicodeDecodeError as e:
        byte_number = len(line) - len(content) + e.start + 1
        return BadLine(path, number, Reason.NOT_UTF8, f"byte {byte_number} of the line")
    except RecursionError:
        return BadLine(path, number, Reason.NOT_JSON, "it is nested too deeply")
    except ValueError as e:
        return BadLine(path, number, Reason.NOT_JSON, str(e))


def document_of(record: Record, text_field: str, path: str) -> Document | BadLine:
    """Return the document in a record, or a `BadLine` with the reason why it has none."""
    fields = record.fields
    if not isinstance(fields, dict):
        return BadLine(path, record.line, Reason.NO_TEXT, f"it is {json_type(fields)}, not an object")
    text = fields.get(text_field)
    if not isinstance(text, str):
        return BadLine(path, record.line, Reason.NO_TEXT, _missing_text_detail(fields, text_field))
    reason = text_problem(text)
    if reason is not None:
        return BadLine(path, record.line, reason)
    return Document(text, record.line, named_language(fields))


def named_language(fields: dict[str, Any]) -> str | None:
    """Return the text under the key `language` of a record or of its `meta`, or None."""
    meta = fields.get("meta")
    language = fields.get("language", meta.get("language") if isinstance(meta, dict) else None)
    return language if isinstance(language, str) else None


def text_problem(text: str) -> Reason | None:
    """Return the reason why a text cannot be a document, or None. NUL characters are allowed as valid Unicode."""
    if not text or text.isspace():
        return Reason.EMPTY
    # Encoding fails only for a text with a lone surrogate.
    try:
        text.encode()
    except UnicodeEncodeError:
        return Reason.SURROGATE
    return None


def _missing_text_detail(fields: dict[str, Any], text_field: str) -> str:
    if text_field in fields:
        return f"{text_field!r} is {json_type(fields[text_field])}"
    if "messages" in fields or fields.keys() >= {"prompt", "completion"}:
        return "it is a conversation, and the source's format is not chat"
    return f"no {text_field!r} among {describe_keys(fields)}"


def describe_keys(fields: dict[str, Any]) -> str:
    """Return the first keys of a record in sorted order, shortened, for an error message."""
    # A record may have any keys, so the message shows only some of them, and only their beginnings.
    keys = (
        repr(key) if len(key) <= MAX_KEY_CHARACTERS else f"{key[:MAX_KEY_CHARACTERS]!r}..."
        for key in sorted(fields)[:8]
    )
    return ", ".join(keys) or "no keys"


def json_type(value: Any) -> str:
    """Return the type of a JSON value in words for an error message, for example "a list"."""
    return {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }.get(type(value), "an object")


def read_jsonl(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the lines of a file of JSON lines as documents; see `reading.FormatReader` for the arguments."""
    for record in read_records(storage, file, settings.document_bytes, tally):
        yield record if isinstance(record, BadLine) else document_of(record, source.text_field or "text", file.path)


def read_text(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield a plain text file, or each part between delimiter lines; damage loses its part and all later ones."""
    limit = settings.document_bytes
    part = _TextPart(file.path, limit)
    end = None if source.delimiter is None else source.delimiter.encode()
    number = 0
    try:
        for number, line in enumerate(split_lines(decompress(storage.chunks(file, tally), file.path), limit), start=1):
            if number == 1 and line is not None:
                line = line.removeprefix(BOM)
            # In a file with CR LF line breaks, the CR is still at the end of each line, also of a delimiter line.
            if line is not None and line.removesuffix(b"\r") == end:
                yield from part.finish()
                part = _TextPart(file.path, limit)
            else:
                part.add(number, line)
    except DamageError as damage:
        yield BadLine(file.path, part.first_line or number + 1, Reason.PART_LOST, damage.reason)
        return
    last_items = list(part.finish())
    yield from last_items or ([BadLine(file.path, 1, Reason.EMPTY)] if end is None else [])


class _TextPart:
    """Lines of one document of a plain text file, added one at a time."""

    def __init__(self, path: str, limit: int) -> None:
        self._path, self._limit = path, limit
        self._lines: list[bytes] = []
        # The length includes a newline for each line.
        self._length = 0
        self._too_long = False
        self.first_line = 0
        """Number of the document's first line in the file, from 1; 0 before a line is added."""

    def add(self, number: int, line: bytes | None) -> None:
        """Add a line and its number in the file; None stands for a line that is longer than the limit."""
        self.first_line = self.first_line or number
        self._length += len(line or b"") + 1
        if line is None or self._too_long or self._length - 1 > self._limit:
            self._too_long = True
            self._lines.clear()
        else:
            self._lines.append(line)

    def finish(self) -> Iterator[Document | BadLine]:
        """Yield the document or a `BadLine`; yield nothing for a blank part."""
        if self._too_long:
            yield BadLine(self._path, self.first_line, Reason.TOO_LONG)
            return
        data = b"\n".join(line.removesuffix(b"\r") for line in self._lines)
        if b"\0" in data:
            yield BadLine(self._path, self.first_line, Reason.NUL_BYTES)
            return
        try:
            text = data.decode()
        except UnicodeDecodeError as e:
            bad_line = self.first_line + data.count(b"\n", 0, e.start)
            yield BadLine(self._path, self.first_line, Reason.NOT_UTF8, f"line {bad_line}")
            return
        if text.strip():
            yield Document(text, self.first_line, lines=len(self._lines))
