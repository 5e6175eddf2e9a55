"""Append-only files of JSON lines that stay readable if a writer is killed, and queries on long files.

Readers skip the torn last line of a killed writer. An object store cannot append, so there a file is a folder of
segments in the order of time: one for each line, or one for many lines of a process, which rewrites it once a second.
"""

import atexit
import json
import os
import secrets
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from mhmoe_ray.errors import StorageError
from mhmoe_ray.parsing import Parser, parse_object
from mhmoe_ray.storage import Location, ObjectPath, is_special, report_write_errors, sync

# Size in bytes above which a segment (an object with some lines of a file) gets no more lines. Each write of new lines
# writes the whole segment again, so it must not grow without limit.
SEGMENT_BYTES = 1 << 18
# Readers cache segments that have fewer bytes than this.
SHORT_SEGMENT_BYTES = 1 << 12
WRITE_SECONDS = 1.0
_NEXT_STEP = "`mhmoe resume`"
"""Command that a storage error advises: most lines are written by a run's job, which the error ends."""
_FIX = "restore it from a copy, or move it away"


def append(path: Location, record: dict[str, Any], *, immediate: bool = True) -> None:
    """Append a record to a file as one line of JSON; a failed write is a StorageError.

    With `immediate`, the line is on the disk or in the object store afterwards. Otherwise it may be there only after a
    later `append`, `flush` or `storage.sync`, and no other process may append to the file meanwhile.
    """
    with report_write_errors(path, _NEXT_STEP):
        _append(path, record, immediate)


def _append(path: Location, record: dict[str, Any], immediate: bool) -> None:
    # Readers would skip a line with half of a surrogate pair, which a file name that is not in UTF-8 has.
    line = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode(errors="replace") + b"\n"
    if isinstance(path, ObjectPath):
        if immediate:
            (path / _segment_name(path)).write_bytes(line)
        else:
            _segment_buffer(path).append(line)
        return
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(fd).st_size
        # A writer that was killed may have left an incomplete last line. The new line must not be appended to it,
        # because both would then be lost.
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        # If the disk becomes full, a write takes only a part of the line without an error. The write of the rest then
        # raises the error.
        while line:
            line = line[os.write(fd, line) :]
        if immediate:
            os.fsync(fd)
        if not size:
            sync(path.parent)
    finally:
        os.close(fd)


def flush(path: Location) -> None:
    """Write the lines that this process holds in memory: those for an object store without `immediate`."""
    if isinstance(path, ObjectPath):
        with report_write_errors(path, _NEXT_STEP):
            _segment_buffer(path).write()


def _segment_name(folder: ObjectPath) -> str:
    """Return the name of a new segment, which sorts last although this clock was set back, or another is ahead."""
    times = [int(digits) for part in folder.iterdir() if (digits := part.name.partition("-")[0]).isdecimal()]
    return f"{max([time.time_ns(), *(t + 1 for t in times)]):020d}-{secrets.token_hex(3)}.jsonl"


class _SegmentBuffer:
    """Buffer that gathers the lines of this process for a file on an object store in one segment."""

    def __init__(self, folder: ObjectPath) -> None:
        self._folder, self._lines, self._has_unwritten_lines, self._last_write_time = folder, b"", False, 0.0
        self._name = ""
        atexit.register(self.write)

    def append(self, line: bytes) -> None:
        if not self._lines:
            self._name = _segment_name(self._folder)
        self._lines += line
        self._has_unwritten_lines = True
        if time.monotonic() - self._last_write_time >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        if not self._has_unwritten_lines:
            return
        (self._folder / self._name).write_bytes(self._lines)
        self._has_unwritten_lines, self._last_write_time = False, time.monotonic()
        if len(self._lines) > SEGMENT_BYTES:
            self._lines = b""


@lru_cache(maxsize=16)
def _segment_buffer(path: ObjectPath) -> _SegmentBuffer:
    return _SegmentBuffer(path)


def parts_with_sizes(path: Location) -> list[tuple[Location, int]]:
    """Return a file's parts and their sizes in bytes: its segments in order, or the file itself if it exists."""
    if isinstance(path, ObjectPath):
        return [*path.sizes()]
    if is_special(path):
        raise StorageError(f"file {path}", "it is no regular file", _FIX)
    return [(path, path.stat().st_size)] if path.exists() else []


def read(path: Location, parse: Parser = parse_object) -> Iterator[dict[str, Any]]:
    """Yield the content of all lines that `parse` accepts, in order; a file of other lines alone is a StorageError."""
    lines = (line for part, size in parts_with_sizes(path) for line in _part_lines(part, size))
    return parse_lines(lines, parse, path)


def _part_lines(part: Location, size: int) -> Iterator[bytes]:
    if isinstance(part, Path):
        with part.open("rb") as f:
            yield from f
    else:
        yield from (_read_short_segment if size < SHORT_SEGMENT_BYTES else _read_segment)(part, size).splitlines()


def _read_segment(part: ObjectPath, size: int) -> bytes:
    return part.read_bytes()


# A segment (an object with some of a file's lines) only grows, so its name and size identify its content. Without the
# cache, a command that follows a run for days would request each event from the store at every poll.
_read_short_segment = lru_cache(maxsize=1 << 16)(_read_segment)


def parse_lines(lines: Iterable[bytes], parse: Parser, path: Location | None = None) -> Iterator[dict[str, Any]]:
    """Yield the content of each line, without lines that `parse` refuses, such as torn ones.

    If `path` names the file of which `lines` are all, several lines without any content are a StorageError.
    """
    accepted_count = refused_count = 0
    for line in lines:
        try:
            content = parse(line)
        except ValueError:
            refused_count += bool(line.strip())
            continue
        accepted_count += 1
        yield content
    # A single line may be torn: a process was killed while it wrote the first one, or is still writing it.
    if path and refused_count > 1 and not accepted_count:
        raise StorageError(f"file {path}", f"none of its {refused_count:,} lines has the fields that it needs", _FIX)


def modification_time(path: Location) -> float:
    """Return the time of a file's last line in seconds since the epoch; 0 if it has no lines."""
    return max((part.stat().st_mtime for part, _ in parts_with_sizes(path)[-1:]), default=0.0)


class Tail:
    """Reader of the lines that are added to a file; with `from_now`, lines older than the reader are skipped."""

    def __init__(self, path: Location, parse: Parser = parse_object, *, from_now: bool = False) -> None:
        self._path, self._parse, self._offsets = path, parse, dict[str, int]()
        if from_now:
            self._offsets = {part.name: size for part, size in parts_with_sizes(path)}

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines that were added since the last call."""
        for part, size in parts_with_sizes(self._path):
            offset = self._offsets.get(part.name, 0)
            if offset == size:
                continue
            with part.open("rb") as f:
                f.seek(offset)
                new_bytes = f.read()
            # A last line without a line break is still being written, so the next call reads it again.
            complete_lines = new_bytes[: new_bytes.rfind(b"\n") + 1]
            self._offsets[part.name] = offset + len(complete_lines)
            yield from parse_lines(complete_lines.splitlines(), self._parse)


# Number of bytes of each read in `lines_backwards`, and of the first read in `line_at`.
BLOCK_BYTES = 1 << 16
PROBE_BYTES = 1 << 12


class JsonlSnapshot:
    """Random access to the complete lines that a file of JSON lines had when this object was created."""

    def __init__(self, path: Location, parse: Parser = parse_object) -> None:
        self._path, self._parse, self._parts, sizes = path, parse, list[Location](), list[int]()
        for part, size in parts_with_sizes(path):
            self._parts.append(part)
            sizes.append(size)
        self._ends = list(accumulate(sizes))
        self.size = self._ends[-1] if self._ends else 0
        """Size in bytes."""

    def lines_backwards(self) -> Iterator[dict[str, Any]]:
        """Yield the content of all lines, the last one first; a file that `read` refuses is a StorageError."""
        return parse_lines(self._raw_lines_backwards(), self._parse, self._path)

    def _raw_lines_backwards(self) -> Iterator[bytes]:
        end, partial_line = self.size, b""
        for index in reversed(range(len(self._parts))):
            part_start = self._part_start(index)
            while end > part_start:
                block = self._read_range(index, max(part_start, end - BLOCK_BYTES), end)
                end -= len(block)
                partial_line, *lines = (block + partial_line).split(b"\n")
                yield from reversed(lines)
            yield partial_line
            partial_line = b""

    def line_at(self, offset: int) -> dict[str, Any] | None:
        """Return the content of the first complete line that begins at or after byte `offset`; None without one."""
        index = bisect_right(self._ends, offset)
        while index < len(self._parts):
            start, end, length = max(offset, self._part_start(index)), self._ends[index], PROBE_BYTES
            # Except at the start of a part of the file, the read begins one byte before `start`. A line begins at
            # `start` only if that byte is a line break.
            starts_inside = start > self._part_start(index)
            while True:
                block = self._read_range(index, start - starts_inside, min(end, start + length))
                lines = block.split(b"\n")[starts_inside:-1]
                if line := next(parse_lines(lines, self._parse), None):
                    return line
                if start + length >= end:
                    break
                length *= 2
            index += 1
        return None

    def sample_lines(self, count: int) -> list[dict[str, Any]]:
        """Return `count` lines in order, evenly spaced in bytes; a line of a short file may appear twice."""
        lines = (self.line_at(self.size * i // count) for i in range(count))
        return [line for line in lines if line]

    def first_match(self, predicate: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """Return the first line that fits `predicate`, by bisection, as all later lines must fit too; else None."""
        low, high = 0, self.size
        while low < high:
            middle = (low + high) // 2
            line = self.line_at(middle)
            if line is None or predicate(line):
                high = middle
            else:
                low = middle + 1
        return self.line_at(low)

    def _part_start(self, index: int) -> int:
        return self._ends[index - 1] if index else 0

    def _read_range(self, index: int, start: int, stop: int) -> bytes:
        """Return the bytes of part `index` between two offsets in the whole file."""
        with self._parts[index].open("rb") as f:
            f.seek(start - self._part_start(index))
            return bytes(f.read(stop - start))
