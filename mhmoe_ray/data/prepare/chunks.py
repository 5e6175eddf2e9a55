"""The documents of raw files in chunks: what one task tokenises, and what a restart finds done or not.

What could not be read goes to the quarantine: kept with its place and reason, counted by source; too much of it stops
the job.

A chunk ends with what fills it, a document or a line that cannot be read, so chunks depend on the file alone. The last
one of a file may hold none.
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
"""Lines that must be read before a share of them says something of the rest."""


def entry(domain: str, bad: BadLine) -> str:
    """A line of the quarantine file."""
    fields = {"domain": domain, "path": bad.path, "line": bad.line, "reason": bad.reason, "detail": bad.detail}
    return json.dumps(fields) + "\n"


class Limit:
    """How much may go into quarantine before a job stops.

    Args:
        spec: its `max_bad_...` keys.
        files: all raw ones; none where all of them have been read.
    """

    def __init__(self, spec: DataSpec, files: Iterable[RawFile]) -> None:
        self._lines, self._share, self._files = spec.max_bad_lines, spec.max_bad_share, spec.max_bad_files
        self._text_bytes = sum(file.size * file.inflation for file in files)

    def exceeded(self, tally: Tally) -> bool:
        """Whether the whole has more than is allowed, of which this is the tally."""
        return tally.damaged > self._files or tally.bad_lines > max(self._lines, int(self._share * tally.lines))

    def hopeless(self, tally: Tally) -> bool:
        """Whether the whole will have more than is allowed, as far as this tally of a part of it tells."""
        if tally.damaged > self._files:
            return True
        if not self._share:
            return tally.bad_lines > self._lines
        if tally.lines < EVIDENCE or not tally.text_bytes:
            return False
        expected = tally.lines * max(1.0, self._text_bytes / tally.text_bytes)
        return tally.bad_lines > max(self._lines, 2 * self._share * expected)

    def error(self, tally: Tally) -> DataError:
        """What to say when it is exceeded."""
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
"""Characters of text: a part of a second for one core, or seconds where the tokenizers library encodes."""

BAD = 500
"""Characters for which a line counts that cannot be read."""

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
    """Some documents of a file, in their order."""

    file: int
    """The file's number among all of the spec."""
    number: int
    """Within the file, from 0."""
    texts: list[str]
    tally: Tally
    """Of what was read since the chunk before."""
    stopped: bool
    """Reading ended here, since more is bad than the spec allows."""

    def as_table(self) -> pa.Table:
        row = self._asdict() | {"chunk": self.number, "tally": pickle.dumps(self.tally)}
        return pa.Table.from_pylist([row], SCHEMA)

    @classmethod
    def of_table(cls, table: pa.Table) -> "Chunk":
        """Of a table of one row."""
        file, number, texts, tally, stopped = (column[0].as_py() for column in table.select(SCHEMA.names).columns)
        return cls(file, number, texts, pickle.loads(tally), stopped)


def read_chunks(
    table: pa.Table, *, spec: DataSpec, limit: Limit, quarantine: Path, characters: int
) -> Iterator[pa.Table]:
    """The chunks of raw files, one a table.

    Args:
        table: rows of `number` and the fields of `RawFile`.
        spec: the data section they were found by.
        limit: past which reading a file ends.
        quarantine: folder that gets what cannot be read, a file for each chunk that has such.
        characters: of text that fill a chunk.
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
