"""Chunks of the documents of raw files, the quarantine of unreadable lines, and the limit on quarantined lines.

A chunk is the unit of work of a task and the unit that a restarted job can reuse. It ends with the document or
unreadable line that fills it, so chunks depend on the file alone. The last one may have no items. An unreadable line
goes to the quarantine with its location and reason.
"""

import json
import pickle
from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

import pyarrow as pa

from mhmoe_ray.data.chat.template import ChatTemplate
from mhmoe_ray.data.sources import BadLine, Document, FileReader, RawFile, Reason, Tally
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import Location, replace_file

MIN_EVIDENCE_LINES = 10_000
"""Lines after which the share of bad lines serves as an estimate for the rest."""


def quarantine_entry(domain: str, bad: BadLine) -> str:
    """Return the JSON line of the quarantine file for an unreadable item."""
    fields = {"domain": domain, "path": bad.path, "line": bad.line, "reason": bad.reason, "detail": bad.detail}
    return json.dumps(fields) + "\n"


class QuarantineLimit:
    """Limit on the quarantined lines and damaged files of a job, above which the job is aborted.

    Only `will_be_exceeded` needs all raw files, by whose sizes it estimates the number of lines.
    """

    def __init__(self, spec: DataSpec, files: Iterable[RawFile]) -> None:
        self._max_lines, self._max_share, self._max_files = spec.max_bad_lines, spec.max_bad_share, spec.max_bad_files
        self._text_bytes = sum(file.size * file.inflation for file in files)

    def is_exceeded(self, tally: Tally) -> bool:
        """Return whether all files together have too many bad items."""
        return tally.damaged > self._max_files or tally.bad_lines > max(
            self._max_lines, int(self._max_share * tally.lines)
        )

    def will_be_exceeded(self, tally: Tally) -> bool:
        """Estimate from the files read so far whether all will have too many bad items."""
        if tally.damaged > self._max_files:
            return True
        # Without `max_bad_share` the limit does not grow with the text, so no estimate is needed.
        if not self._max_share:
            return tally.bad_lines > self._max_lines
        if tally.lines < MIN_EVIDENCE_LINES or not tally.text_bytes:
            return False
        expected_lines = tally.lines * max(1.0, self._text_bytes / tally.text_bytes)
        # The number of all lines is an estimate, so a job is aborted early only above twice the limit.
        return tally.bad_lines > max(self._max_lines, 2 * self._max_share * expected_lines)

    def error(self, tally: Tally) -> DataError:
        """Return the error that aborts the job, with one bad item as an example."""
        if tally.damaged > self._max_files:
            return tally.examples[Reason.PART_LOST].damage_error(tally.damaged, self._max_files)
        bad_line = next(bad for reason, bad in tally.examples.items() if not reason.loses_lines)
        limit_text = f"data.max_bad_lines is {self._max_lines:,}"
        if self._max_share:
            limit_text += f" and data.max_bad_share {self._max_share:g}"
        return DataError(
            f"{bad_line.path} line {bad_line.line}",
            f"{bad_line.message} ({tally.bad_lines:,} of {tally.lines:,} unreadable so far, {limit_text})",
            "repair or remove the line, or raise data.max_bad_lines or data.max_bad_share",
        )


CHUNK_CHARACTERS = 4 << 20
"""Size of a chunk: characters of text plus bytes of images and annotations. A core tokenises it in a fraction of a
second with tiktoken, or in seconds with tokenizers."""

BAD_LINE_CHARACTERS = 500
"""Characters that an unreadable line adds to the size of a chunk."""


class DocumentChunk(NamedTuple):
    """Consecutive documents of one raw file, for one task."""

    file: int
    """Number of the file among all files of the spec."""
    number: int
    """Number of the chunk within the file, from 0."""
    documents: list[Document]
    tally: Tally
    """Counts of the items read since the previous chunk."""
    is_aborted: bool
    """True if the reading of the file was aborted here for too many bad items."""
    path: str = ""
    """Path or URI of the file."""

    def as_table(self) -> pa.Table:
        """Return the chunk as a table of one row."""
        return pa.table({"chunk": pa.array([pickle.dumps(self)], pa.large_binary())})

    @classmethod
    def from_table(cls, table: pa.Table) -> "DocumentChunk":
        """Return the chunk in a table from `as_table`."""
        chunk = pickle.loads(table["chunk"][0].as_buffer())
        assert isinstance(chunk, cls)
        return chunk


def read_chunks(
    table: pa.Table,
    *,
    spec: DataSpec,
    limit: QuarantineLimit,
    quarantine: Location,
    characters: int,
    template: ChatTemplate | None = None,
) -> Iterator[pa.Table]:
    """Read the raw files in a table (`number` and the fields of `RawFile`) and yield their chunks, one a table.

    Each chunk with unreadable items writes one file to `quarantine`. A file that alone will probably exceed `limit` is
    aborted.
    """
    for row in table.to_pylist():
        file = RawFile.from_row(row)
        for chunk in _file_chunks(row["number"], file, spec, limit, quarantine, characters, template):
            yield chunk.as_table()


def _file_chunks(
    file_number: int,
    file: RawFile,
    spec: DataSpec,
    limit: QuarantineLimit,
    quarantine: Location,
    characters: int,
    template: ChatTemplate | None,
) -> Iterator[DocumentChunk]:
    reader = FileReader(file, spec, template)
    items, previous_tally = iter(reader), Tally()
    for chunk_number in count():
        documents, bad_entries, size, is_aborted, is_last = list[Document](), list[str](), 0, False, True
        for item in items:
            if isinstance(item, Document):
                documents.append(item)
                size += len(item.text) + sum(map(len, filter(None, (item.image, item.second_image, item.annotation))))
            else:
                bad_entries.append(quarantine_entry(file.domain, item))
                # A fixed size is added instead of the entry's length, which depends on the names of folders: the
                # division of a file into chunks must depend on the file alone.
                size += BAD_LINE_CHARACTERS
                is_aborted = limit.will_be_exceeded(reader.tally)
            if is_aborted or size >= characters:
                is_last = is_aborted
                break
        if bad_entries:
            replace_file(quarantine_file(quarantine, file_number, chunk_number), "".join(bad_entries).encode())
        # The last chunk is yielded even without items: its tally counts the file and the bytes at its end.
        tally = reader.tally.counts_since(previous_tally)
        yield DocumentChunk(file_number, chunk_number, documents, tally, is_aborted, file.path)
        previous_tally = reader.tally.copy()
        if is_last:
            return


def quarantine_file(folder: Location, file: int, chunk: int) -> Location:
    """Return the file of a chunk's unreadable lines."""
    return folder / f"{file:07d}-{chunk:07d}.jsonl"
