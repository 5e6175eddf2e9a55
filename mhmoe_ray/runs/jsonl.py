"""Append-only files of JSON lines that survive a writer killed in mid-line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line in one write; after a torn last line, start a fresh one."""
    line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(fd, line)
    finally:
        os.close(fd)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines, in order; none if there is no file. A torn line, left by a killed writer, is passed over."""
    if not path.exists():
        return
    with path.open("rb") as f:
        for line in f:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def last(path: Path, window: int = 1 << 16) -> dict[str, Any] | None:
    """The last whole line, if it lies within the file's last `window` bytes."""
    if not path.exists():
        return None
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - window))
        lines = f.read().split(b"\n")
    for line in reversed(lines):
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        return found
    return None


class Tail:
    """The whole lines that were added to a file since the last look, or, at first, since this was made."""

    def __init__(self, path: Path, *, from_now: bool = False) -> None:
        self._path, self._offset = path, path.stat().st_size if from_now and path.exists() else 0

    def new(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as f:
            f.seek(self._offset)
            while (line := f.readline()).endswith(b"\n"):
                self._offset += len(line)
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
