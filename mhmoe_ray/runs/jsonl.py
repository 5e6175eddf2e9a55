"""Append-only files of JSON lines that survive a writer killed in mid-line, and fast queries on long ones.

An object store cannot append: there such a file is a folder of segments in order of time. Each line is a segment of its
own; or, where lines come fast and from one process, lines are gathered in a segment that is written again once a
second.
"""

import atexit
import json
import os
import secrets
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from mhmoe_ray.errors import StorageError
from mhmoe_ray.storage import Location, ObjectPath

SEGMENT_BYTES = 1 << 18
SHORT_BYTES = 1 << 12
PUT_SECONDS = 1.0


def append(path: Location, record: dict[str, Any], *, at_once: bool = True) -> None:
    """Append one line in one write; after a torn last line, start a new line.

    Args:
        path: path of the file.
        record: content of the line, which JSON must be able to hold.
        at_once: whether the line is written at once on an object store too. Otherwise it may be written only with a
            line that is appended a second later, or by `flush`, and no other process may append at that time.

    Raises:
        StorageError: the storage is full, read-only or out of reach.
    """
    with _writing(path):
        _append(path, record, at_once)


@contextmanager
def _writing(path: Location) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        fix = "make room or mend the storage, then `mhmoe resume`"
        raise StorageError(f"file {path}", f"it cannot be written: {e.strerror or e}", fix) from e


def _append(path: Location, record: dict[str, Any], at_once: bool) -> None:
    line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
    if isinstance(path, ObjectPath):
        if at_once:
            (path / _segment_name()).write_bytes(line)
        else:
            _gathered(path).append(line)
        return
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # only a disk that is full takes a part of one; to write the rest says so
            line = line[os.write(fd, line) :]
    finally:
        os.close(fd)


def flush(path: Location) -> None:
    """Return when everything that this process appended can be read.

    Raises:
        StorageError: the storage is full, read-only or out of reach.
    """
    if isinstance(path, ObjectPath):
        with _writing(path):
            _gathered(path).put()


def _segment_name() -> str:
    return f"{time.time_ns():020d}-{secrets.token_hex(3)}.jsonl"


class _Gathered:
    """Lines of this process that are gathered to one segment on an object store."""

    def __init__(self, folder: ObjectPath) -> None:
        self._folder, self._lines, self._waiting, self._put = folder, b"", False, 0.0
        self._name = ""
        atexit.register(self.put)

    def append(self, line: bytes) -> None:
        if not self._lines:
            self._name = _segment_name()
        self._lines += line
        self._waiting = True
        if time.monotonic() - self._put >= PUT_SECONDS:
            self.put()

    def put(self) -> None:
        if not self._waiting:
            return
        (self._folder / self._name).write_bytes(self._lines)
        self._waiting, self._put = False, time.monotonic()
        if len(self._lines) > SEGMENT_BYTES:
            self._lines = b""


@lru_cache(maxsize=16)
def _gathered(path: ObjectPath) -> _Gathered:
    return _Gathered(path)


def parts_with_sizes(path: Location) -> list[tuple[Location, int]]:
    """Return the files that together make up this one, in order, with their sizes in bytes."""
    if isinstance(path, ObjectPath):
        return [*path.sizes()]
    return [(path, path.stat().st_size)] if path.exists() else []


def read(path: Location) -> Iterator[dict[str, Any]]:
    """Yield all whole lines, in order; none if there is no file.

    A torn line, left by a writer that was killed, is skipped.
    """
    for part, size in parts_with_sizes(path):
        if isinstance(part, Path):
            with part.open("rb") as f:
                yield from records(f)
        else:
            yield from records((_short if size < SHORT_BYTES else _segment)(part, size).splitlines())


def _segment(part: ObjectPath, size: int) -> bytes:
    return part.read_bytes()


# A segment only grows. Whoever follows a run for days would ask the store for each of its events at every look.
_short = lru_cache(maxsize=1 << 16)(_segment)


def records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the content of lines, without those that are torn."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def modified(path: Location) -> float:
    """Return the time at which the last line was written, in seconds since the epoch; 0 without any."""
    return max((part.stat().st_mtime for part, _ in parts_with_sizes(path)[-1:]), default=0.0)


class Tail:
    """Reader of the whole lines that were added to a file since the last call of `new`.

    The first call yields all lines or, with `from_now`, those that were added since the reader was created.
    """

    def __init__(self, path: Location, *, from_now: bool = False) -> None:
        self._path, self._read = path, dict[str, int]()
        if from_now:
            self._read = {part.name: size for part, size in parts_with_sizes(path)}

    def new(self) -> Iterator[dict[str, Any]]:
        for part, size in parts_with_sizes(self._path):
            seen = self._read.get(part.name, 0)
            if seen == size:
                continue
            with part.open("rb") as f:
                f.seek(seen)
                added = f.read()
            whole = added[: added.rfind(b"\n") + 1]
            self._read[part.name] = seen + len(whole)
            yield from records(whole.splitlines())


BLOCK = 1 << 16
PROBE = 1 << 12


class Glimpse:
    """Access to any line of a file as it was when this was created; torn lines are skipped."""

    def __init__(self, path: Location) -> None:
        self._parts, sizes = [], []
        for part, size in parts_with_sizes(path):
            self._parts.append(part)
            sizes.append(size)
        self._ends = list(accumulate(sizes))
        self.size = self._ends[-1] if self._ends else 0
        """Size of the file in bytes."""

    def backwards(self) -> Iterator[dict[str, Any]]:
        """Yield all lines, the last one first."""
        end, rest = self.size, b""
        for index in reversed(range(len(self._parts))):
            begin = self._begin(index)
            while end > begin:
                block = self._read(index, max(begin, end - BLOCK), end)
                end -= len(block)
                rest, *lines = (block + rest).split(b"\n")
                yield from records(reversed(lines))
            yield from records([rest])
            rest = b""

    def at(self, offset: int) -> dict[str, Any] | None:
        """Return the first whole line that begins at or after byte `offset`; None past the last one."""
        index = bisect_right(self._ends, offset)
        while index < len(self._parts):
            begin, end, length = max(offset, self._begin(index)), self._ends[index], PROBE
            inside = begin > self._begin(index)
            while True:
                found = self._read(index, begin - inside, min(end, begin + length))
                lines = found.split(b"\n")[inside:-1]
                if line := next(records(lines), None):
                    return line
                if begin + length >= end:
                    break
                length *= 2
            index += 1
        return None

    def spread(self, count: int) -> list[dict[str, Any]]:
        """Return about `count` lines in order, evenly spaced; of a file with fewer lines, some appear twice."""
        found = (self.at(self.size * i // count) for i in range(count))
        return [line for line in found if line]

    def first(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """Return the first line for which `holds` is true, found by bisection; None if there is none.

        Args:
            holds: predicate that is true for all lines after the first one for which it is true.
        """
        below, above = 0, self.size
        while below < above:
            middle = (below + above) // 2
            line = self.at(middle)
            if line is None or holds(line):
                above = middle
            else:
                below = middle + 1
        return self.at(below)

    def _begin(self, index: int) -> int:
        return self._ends[index - 1] if index else 0

    def _read(self, index: int, start: int, stop: int) -> bytes:
        with self._parts[index].open("rb") as f:
            f.seek(start - self._begin(index))
            return bytes(f.read(stop - start))
