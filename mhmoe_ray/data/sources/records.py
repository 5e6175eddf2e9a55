"""Records of files of JSON lines: one object a line; blank lines are passed over.

A line is read by orjson; what that refuses gets a second opinion of the standard library, which also takes NaN, a lone
surrogate outside of the text, and a byte order mark.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from mhmoe_ray.data.sources.compression import decompressed
from mhmoe_ray.data.sources.items import BadLine, DamageError, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.lines import lines
from mhmoe_ray.data.sources.storage import Storage

MOST_OF_KEY = 40
"""Characters of one that is shown."""
BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    line: int
    fields: Any
    """Any JSON value: whether it is an object with a text is the reader's question."""


def read_records(storage: Storage, file: RawFile, limit: int, tally: Tally) -> Iterator[Record | BadLine]:
    """The values of a file of JSON lines.

    Args:
        storage: where the file is.
        file: which one.
        limit: of a line, in bytes.
        tally: whose `bytes_read` is kept up to date.
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
    """None for a blank line."""
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
    """The document that a record holds."""
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
    """Why a text cannot be a document. NUL characters are no reason: they are valid Unicode."""
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
