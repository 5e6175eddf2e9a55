"""Readers of text files, decompressed and read line by line: JSON lines and plain text.

JSON lines: a line is a document, as in RedPajama-1T and most other corpora; blank lines are skipped. A line is parsed
by orjson; if it refuses the line, the standard library decides, which also accepts NaN, a lone surrogate outside of the
text, and a byte order mark.

Plain text: a file is a document, or each of its parts between delimiter lines is one. A byte order mark and the last
line break are not part of a document; CR LF becomes LF. A NUL byte means that it is not text. Between delimiters blank
parts are skipped; a file that is blank as a whole is reported.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import orjson

from mhmoe_ray.data.sources.compression import decompressed
from mhmoe_ray.data.sources.items import BadLine, DamageError, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import SourceSpec


def lines(chunks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Yield each line without its newline, and None in place of a line that is longer than `limit` bytes.

    Raises:
        DamageError: `chunks` raises it; it then carries the beginning of the line that was cut off, if that is within
            the limit.
    """
    held: list[bytes] = []  # pieces of a line that began in an earlier chunk
    length = 0  # of that line, whose pieces are dropped once it is too long
    try:
        for chunk in chunks:
            *whole, rest = chunk.split(b"\n")
            if whole:
                length += len(whole[0])
                yield b"".join([*held, whole[0]]) if length <= limit else None
                for i in range(1, len(whole)):
                    yield whole[i] if len(whole[i]) <= limit else None
                held, length = [], 0
            if rest:
                length += len(rest)
                held.append(rest)
                if length > limit:
                    held.clear()
    except DamageError as damage:
        damage.rest = b"".join(held)
        raise
    if length:
        yield b"".join(held) if length <= limit else None


MOST_OF_KEY = 40
"""Largest number of characters of a key that is shown in a message."""
BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    line: int
    fields: Any
    """Any JSON value; the caller checks whether it is an object with a text."""


def read_records(storage: Storage, file: RawFile, limit: int, tally: Tally) -> Iterator[Record | BadLine]:
    """Yield the values in a file of JSON lines, and the lines that could not be read.

    Args:
        storage: the storage that holds the file.
        file: the file to read.
        limit: largest size of a line in bytes.
        tally: the tally whose `bytes_read` is kept up to date.
    """
    number = 0
    try:
        for number, line in enumerate(lines(decompressed(storage.chunks(file, tally), file.path), limit), start=1):
            if line is None:
                yield BadLine(file.path, number, Reason.TOO_LONG)
                continue
            try:
                fields = orjson.loads(line)
            except ValueError:
                record = _second_opinion(file.path, number, line)
                if record is not None:
                    yield record
            else:
                yield Record(number, fields)
    except DamageError as damage:
        cut = _second_opinion(file.path, number + 1, damage.rest)
        if isinstance(cut, Record):  # only its newline was cut off
            number += 1
            yield cut
        yield BadLine(file.path, number + 1, Reason.LOST, damage.reason)


def _second_opinion(path: str, number: int, line: bytes) -> Record | BadLine | None:
    """Parse a line with the standard library; return None for a blank line."""
    content = line.removeprefix(BOM)
    if not content.strip():
        return None
    if b"\0" in content:  # a hole that a crash left, or UTF-16
        return BadLine(path, number, Reason.NUL_BYTES)
    try:
        return Record(number, json.loads(content.decode()))
    except UnicodeDecodeError as e:
        at = len(line) - len(content) + e.start + 1
        return BadLine(path, number, Reason.NOT_UTF8, f"byte {at} of the line")
    except RecursionError:
        return BadLine(path, number, Reason.NOT_JSON, "it is nested too deeply")
    except ValueError as e:
        return BadLine(path, number, Reason.NOT_JSON, str(e))


def document_of(record: Record, text_field: str, path: str) -> Document | BadLine:
    """Return the document that a record holds, or the reason why it holds none."""
    fields = record.fields
    if not isinstance(fields, dict):
        return BadLine(path, record.line, Reason.NO_TEXT, f"it is {_kind(fields)}, not an object")
    text = fields.get(text_field)
    if not isinstance(text, str):
        return BadLine(path, record.line, Reason.NO_TEXT, _why_no_text(fields, text_field))
    reason = unusable(text)
    if reason is not None:
        return BadLine(path, record.line, reason)
    meta = fields.get("meta")
    language = fields.get("language", meta.get("language") if isinstance(meta, dict) else None)
    return Document(text, record.line, language if isinstance(language, str) else None)


def unusable(text: str) -> Reason | None:
    """Return the reason why a text cannot be a document, or None if it can.

    NUL characters are no such reason: they are valid Unicode.
    """
    if not text or text.isspace():
        return Reason.EMPTY
    try:
        text.encode()
    except UnicodeEncodeError:
        return Reason.SURROGATE
    return None


def _why_no_text(fields: dict[str, Any], text_field: str) -> str:
    if text_field in fields:
        return f"{text_field!r} is {_kind(fields[text_field])}"
    keys = (repr(key) if len(key) <= MOST_OF_KEY else f"{key[:MOST_OF_KEY]!r}..." for key in sorted(fields)[:8])
    return f"no {text_field!r} among " + (", ".join(keys) or "no keys")


def _kind(value: Any) -> str:
    return {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }.get(type(value), "an object")


def read_jsonl(
    storage: Storage, file: RawFile, source: SourceSpec, limit: int, tally: Tally
) -> Iterator[Document | BadLine]:
    """Read a file of JSON lines; see `reading.Read`."""
    for record in read_records(storage, file, limit, tally):
        yield record if isinstance(record, BadLine) else document_of(record, source.text_field or "text", file.path)


def read_text(
    storage: Storage, file: RawFile, source: SourceSpec, limit: int, tally: Tally
) -> Iterator[Document | BadLine]:
    """Read a plain text file; see `reading.Read`."""
    part = _Part(file.path, limit)
    end = None if source.delimiter is None else source.delimiter.encode()
    number = 0
    try:
        for number, line in enumerate(lines(decompressed(storage.chunks(file, tally), file.path), limit), start=1):
            if number == 1 and line is not None:
                line = line.removeprefix(BOM)
            if line is not None and line.removesuffix(b"\r") == end:
                yield from part.finish()
                part = _Part(file.path, limit)
            else:
                part.add(number, line)
    except DamageError as damage:
        yield BadLine(file.path, part.first or number + 1, Reason.LOST, damage.reason)
        return
    made = list(part.finish())
    yield from made or ([BadLine(file.path, 1, Reason.EMPTY)] if end is None else [])


class _Part:
    """Lines of one document of a plain text file."""

    def __init__(self, path: str, limit: int) -> None:
        self._path, self._limit = path, limit
        self._lines: list[bytes] = []
        self._length = 0  # with a newline for each line
        self._too_long = False
        self.first = 0
        """Number of the first line; 0 before a line is added."""

    def add(self, number: int, line: bytes | None) -> None:
        self.first = self.first or number
        self._length += len(line or b"") + 1
        if line is None or self._too_long or self._length - 1 > self._limit:
            self._too_long = True
            self._lines.clear()
        else:
            self._lines.append(line)

    def finish(self) -> Iterator[Document | BadLine]:
        """Yield the document or the reason why it cannot be read; nothing for a blank part, since delimiters may follow
        one another."""
        if self._too_long:
            yield BadLine(self._path, self.first, Reason.TOO_LONG)
            return
        data = b"\n".join(line.removesuffix(b"\r") for line in self._lines)
        if b"\0" in data:
            yield BadLine(self._path, self.first, Reason.NUL_BYTES)
            return
        try:
            text = data.decode()
        except UnicodeDecodeError as e:
            bad = self.first + data.count(b"\n", 0, e.start)
            yield BadLine(self._path, self.first, Reason.NOT_UTF8, f"line {bad}")
            return
        if text.strip():
            yield Document(text, self.first)
