"""Raw files: finding them, and reading their documents line by line. An unreadable line is told, not lost."""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz")


class RawFile(NamedTuple):
    domain: str
    """<source>/<subfolder>, for example redpajama/book."""
    path: str


class BadLine(NamedTuple):
    path: str
    line: int
    """From 1."""
    reason: str


def find_files(spec: DataSpec) -> list[RawFile]:
    """All raw files of a spec, in an order that depends on names only.

    Raises:
        DataError: a source or a named subfolder is missing or holds no file.
    """
    found = []
    for name, source in spec.sources.items():
        if not source.path.is_dir():
            fix = "correct data.sources, or make sample text: mhmoe data sample data/sample"
            raise DataError(f"source {name}", f"there is no folder {source.path}", fix)
        names = spec.subfolders(name) or sorted(p.name for p in source.path.iterdir() if p.is_dir())
        if not names:
            fix = "put one folder per domain or language there"
            raise DataError(f"source {name}", f"{source.path} has no subfolders", fix)
        for sub in names:
            files = sorted(p for p in (source.path / sub).rglob("*") if p.name.endswith(SUFFIXES))
            if not files:
                why = f"{source.path / sub} holds no file ending in {', '.join(SUFFIXES)}"
                raise DataError(f"source {name}/{sub}", why, "correct data.sources")
            found += [RawFile(f"{name}/{sub}", os.fspath(p)) for p in files]
    return found


def read_documents(path: str) -> Iterator[str | BadLine]:
    """The texts of a JSON-lines file (`text` is required, anything beside it is not), and its unreadable lines."""
    number = 0
    try:
        with pa.input_stream(path) as stream:  # decompresses by name
            for number, line in enumerate(io.BufferedReader(stream), start=1):
                text = _text_of(line)
                if isinstance(text, str):
                    yield text
                elif text is not None:
                    yield BadLine(path, number, text[0])
    except OSError as e:
        reason = e.strerror or str(e)
        yield BadLine(path, number + 1, f"the file ends in damage: {reason}")


def _text_of(line: bytes) -> str | tuple[str] | None:
    """The text; or (reason,); or None for a blank line."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return ("it is not UTF-8",)
    except ValueError as e:
        return (f"it is not JSON ({e})",)
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        return ("it has no text",)
    try:
        text.encode()
    except UnicodeEncodeError:
        return ("its text holds half a character (a lone surrogate)",)
    return text if text.strip() else ("its text is empty",)


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its text, so that copies of it are on the same side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
