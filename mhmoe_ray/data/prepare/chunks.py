"""Chunks of the documents of raw files: a chunk is what one task tokenises, and what a restart finds done or not.

What cannot be read goes to the quarantine with its place and reason, and is counted by source; too much of it stops the
job.

A chunk ends with the item that fills it, a document or a line that cannot be read, so chunks depend on the file alone.
The last chunk of a file may hold no items.
"""

import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from mhmoe_ray.data.sources import BadLine, Document, RawFile, Reading, Reason, Tally
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import replace_file

FILE = "quarantine.jsonl"

EVIDENCE = 10_000
"""Number of lines that must be read before the share of bad ones is taken as an estimate for the rest."""


def entry(domain: str, bad: BadLine) -> str:
    """Return the line of the quarantine file for one item."""
    fields = {"domain": domain, "path": bad.path, "line": bad.line, "reason": bad.reason, "detail": bad.detail}
    return json.dumps(fields) + "\n"


class Limit:
    """Limit on how much may go into quarantine before a job stops.

    Args:
        spec: the data section with the `max_bad_...` keys.
        files: all raw files; none if all of them have been read already.
    """

    def __init__(self, spec: DataSpec, files: Iterable[RawFile]) -> None:
        self._lines, self._share, self._files = spec.max_bad_lines, spec.max_bad_share, spec.max_bad_files
        self._text_bytes = sum(file.size * file.inflation for file in files)

    def exceeded(self, tally: Tally) -> bool:
        """Return whether a tally of all files has more bad items than the spec allows."""
        return tally.damaged > self._files or tally.bad_lines > max(self._lines, int(self._share * tally.lines))

    def hopeless(self, tally: Tally) -> bool:
        """Return whether all files together will have more bad items than allowed, as far as a tally of a part of them
        shows."""
        if tally.damaged > self._files:
            return True
        if not self._share:
            return tally.bad_lines > self._lines
        if tally.lines < EVIDENCE or not tally.text_bytes:
            return False
        expected = tally.lines * max(1.0, self._text_bytes / tally.text_bytes)
        return tally.bad_lines > max(self._lines, 2 * self._share * expected)

    def error(self, tally: Tally) -> DataError:
        """Return the error to raise when the limit is exceeded, with the first bad item as an example."""
        if tally.damaged > self._files:
            lost = tally.first[Reason.LOST]
            return DataError(
                f"{lost.path} line {lost.line}",
                f"{lost.why} ({tally.damaged:,} damaged files so far, data.max_bad_files is {self._files:,})",
                "mend or remove the file, or raise data.max_bad_files",
            )
        first = next(bad for reason, bad in tally.first.items() if not reason.loses_lines)
        allowed = f"data.max_bad_lines is {self._lines:,}"
        if self._share:
            allowed += f" and data.max_bad_share {self._share:g}"
        return DataError(
            f"{first.path} line {first.line}",
            f"{first.why} ({tally.bad_lines:,} of {tally.lines:,} unreadable so far, {allowed})",
            "mend or remove the line, or raise data.max_bad_lines or data.max_bad_share",
        )


CHUNK = 4 << 20
"""Characters of text per chunk: a fraction of a second for one core, or seconds where the tokenizers library
encodes."""

BAD = 500
"""Number of characters that a line that cannot be read counts for."""

SCHEMA = pa.schema(
    [
        ("file", pa.int64()),
        ("chunk", pa.int64()),
        ("texts", pa.list_(pa.large_string())),
        ("tally", pa.binary()),
        ("stopped", pa.bool_()),
    ]
)


class Chunk(NamedTuple):
    """Consecutive documents of one file."""

    file: int
    """Number of the file among all files of the spec."""
    number: int
    """Number of the chunk within the file, from 0."""
    texts: list[str]
    tally: Tally
    """Counts of what was read since the chunk before."""
    stopped: bool
    """Whether reading the file ended here, since more is bad than the spec allows."""

    def as_table(self) -> pa.Table:
        row = self._asdict() | {"chunk": self.number, "tally": pickle.dumps(self.tally)}
        return pa.Table.from_pylist([row], SCHEMA)

    @classmethod
    def of_table(cls, table: pa.Table) -> "Chunk":
        """Return the chunk in a table of one row."""
        file, number, texts, tally, stopped = (column[0].as_py() for column in table.select(SCHEMA.names).columns)
        return cls(file, number, texts, pickle.loads(tally), stopped)


def read_chunks(
    table: pa.Table, *, spec: DataSpec, limit: Limit, quarantine: Path, characters: int
) -> Iterator[pa.Table]:
    """Yield the chunks of raw files, one in each table.

    Args:
        table: a table with the columns `number` and the fields of `RawFile`, a row for each file.
        spec: the data section with which the files were found.
        limit: the limit on bad items at which reading a file ends.
        quarantine: the folder for what cannot be read; each chunk with bad items writes one file.
        characters: characters of text that fill a chunk.
    """
    for row in table.to_pylist():
        file = RawFile(*(row[name] for name in RawFile._fields))
        for chunk in _chunks(row["number"], file, spec, limit, quarantine, characters):
            yield chunk.as_table()


def _chunks(
    number: int, file: RawFile, spec: DataSpec, limit: Limit, quarantine: Path, characters: int
) -> Iterator[Chunk]:
    reading = Reading(file, spec)
    before, texts, bad, size, count, stopped = Tally(), list[str](), list[str](), 0, 0, False

    def finish() -> Chunk:
        nonlocal before, texts, bad, size, count
        if bad:
            replace_file(quarantine_file(quarantine, number, count), "".join(bad).encode())
        chunk = Chunk(number, count, texts, reading.tally.since(before), stopped)
        before, texts, bad, size, count = reading.tally.copy(), [], [], 0, count + 1
        return chunk

    for item in reading:
        if isinstance(item, Document):
            texts.append(item.text)
            size += len(item.text)
        else:
            bad.append(entry(file.domain, item))
            size += BAD  # not what it takes: that depends on the names of folders
            stopped = limit.hopeless(reading.tally)
            if stopped:
                break
        if size >= characters:
            yield finish()
    yield finish()


def quarantine_file(folder: Path, file: int, chunk: int) -> Path:
    return folder / f"{file:07d}-{chunk:07d}.jsonl"
