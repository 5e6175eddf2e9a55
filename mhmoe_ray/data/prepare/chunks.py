"""Chunks of the documents of raw files, the quarantine of unreadable lines, and the limit on quarantined lines.

A chunk is the unit of work of a tokenising task, and the unit that a restarted job can reuse. It ends with the item
that fills it, a document or a line that cannot be read, so chunks depend on the file alone. The last chunk of a file
may have no items.

A line that cannot be read goes to the quarantine with its location and reason, and is counted by reason. Too many such
lines abort the job.
"""

import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from mhmoe_ray.data.chat.template import ChatTemplate, RenderedConversation
from mhmoe_ray.data.sources import BadLine, Document, FileReader, RawFile, Reason, Tally
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import replace_file

QUARANTINE_FILE = "quarantine.jsonl"

MIN_EVIDENCE_LINES = 10_000
"""Number of lines that must be read before the share of bad lines serves as an estimate for the rest."""


def quarantine_entry(domain: str, bad: BadLine) -> str:
    """Return the line of the quarantine file for an item that could not be read, as JSON with a newline."""
    fields = {"domain": domain, "path": bad.path, "line": bad.line, "reason": bad.reason, "detail": bad.detail}
    return json.dumps(fields) + "\n"


class QuarantineLimit:
    """Limit on the quarantined lines and damaged files of a job; above it the job is aborted.

    Args:
        spec: the data section with the `max_bad_...` keys.
        files: all raw files of the job. `will_be_exceeded` estimates the number of lines from their sizes;
            `is_exceeded` does not need them.
    """

    def __init__(self, spec: DataSpec, files: Iterable[RawFile]) -> None:
        self._max_lines, self._max_share, self._max_files = spec.max_bad_lines, spec.max_bad_share, spec.max_bad_files
        self._text_bytes = sum(file.size * file.inflation for file in files)

    def is_exceeded(self, tally: Tally) -> bool:
        """Return whether more items were bad than the spec allows.

        The tally has the counts of the items that were read from all files of the job.
        """
        return tally.damaged > self._max_files or tally.bad_lines > max(
            self._max_lines, int(self._max_share * tally.lines)
        )

    def will_be_exceeded(self, tally: Tally) -> bool:
        """Return whether all files together will probably have more bad items than the spec allows.

        The estimate is based on a tally (the counts of read items) of the files that were read so far. Without
        `max_bad_share`, no estimate is needed: the limit will be exceeded if this tally exceeds it.
        """
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
        """Return the error that aborts a job with too many bad items; it shows one of them as an example.

        Args:
            tally: the counts of read items, which exceed the limit.
        """
        if tally.damaged > self._max_files:
            loss = tally.examples[Reason.PART_LOST]
            return DataError(
                f"{loss.path} line {loss.line}",
                f"{loss.message} ({tally.damaged:,} damaged files so far, data.max_bad_files is {self._max_files:,})",
                "repair or remove the file, or raise data.max_bad_files",
            )
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
"""Size of a chunk: characters of text plus bytes of images and annotations. One core tokenises so much text in a
fraction of a second with tiktoken, or in seconds with the tokenizers library."""

BAD_LINE_CHARACTERS = 500
"""Number of characters that an unreadable line adds to the size of a chunk."""

SCHEMA = pa.schema(
    [
        ("file", pa.int64()),
        ("chunk", pa.int64()),
        ("texts", pa.list_(pa.large_string())),
        ("tally", pa.binary()),
        ("is_aborted", pa.bool_()),
        ("conversations", pa.binary()),
        ("images", pa.list_(pa.large_binary())),
        ("image_hashes", pa.list_(pa.string())),
        ("annotations", pa.list_(pa.large_binary())),
    ]
)


class Chunk(NamedTuple):
    """Consecutive documents of one raw file, which one task tokenises."""

    file: int
    """Number of the file among all files of the spec."""
    number: int
    """Number of the chunk within the file, from 0."""
    texts: list[str]
    tally: Tally
    """Counts of the items that were read since the previous chunk."""
    is_aborted: bool
    """True if the reading of the file was aborted here, since it probably has more bad items than the spec allows."""
    conversations: list[RenderedConversation] | None = None
    """The rendered conversation of each document; None without conversations. `texts` has only the messages."""
    images: list[bytes] | None = None
    """The image of each document, empty if it has none; None if no document's record has an image."""
    image_hashes: list[str] | None = None
    """The hash of the image of each document's record, empty if it has none; None if `images` is None."""
    annotations: list[bytes] | None = None
    """The annotation of each document's image, empty if it has none; None if no document has one."""

    def as_table(self) -> pa.Table:
        """Return the chunk as a table of one row with `SCHEMA`."""
        # Arrow has no types for a tally and for conversations, so they are pickled.
        row = self._asdict() | {"chunk": self.number}
        row |= {"tally": pickle.dumps(self.tally), "conversations": pickle.dumps(self.conversations)}
        return pa.Table.from_pylist([row], SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> "Chunk":
        """Return the chunk in a table that `as_table` made."""
        file, number, texts, tally, is_aborted, conversations, *image_columns = (
            column[0].as_py() for column in table.select(SCHEMA.names).columns
        )
        return cls(file, number, texts, pickle.loads(tally), is_aborted, pickle.loads(conversations), *image_columns)


def read_chunks(
    table: pa.Table,
    *,
    spec: DataSpec,
    limit: QuarantineLimit,
    quarantine: Path,
    characters: int,
    template: ChatTemplate | None = None,
) -> Iterator[pa.Table]:
    """Read raw files and yield their chunks, one in each table; write unreadable lines to the quarantine.

    Args:
        table: a table with the columns `number` and the fields of `RawFile`, a row for each file.
        spec: the data section with which the files were found.
        limit: the limit on bad items; if a file alone will probably exceed it, its reading is aborted, and
            `is_aborted` is true in its last chunk.
        quarantine: the folder for unreadable lines; each chunk with bad items writes one file.
        characters: number of characters of text and bytes of images and annotations that fill a chunk.
        template: the template that renders conversations; None if no source has conversations.
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
    quarantine: Path,
    characters: int,
    template: ChatTemplate | None,
) -> Iterator[Chunk]:
    """Yield the chunks of one file; `read_chunks` describes the arguments."""
    reader = FileReader(file, spec, template)
    previous_tally, texts, bad_entries, size, chunk_number, is_aborted = Tally(), list[str](), list[str](), 0, 0, False
    conversations, images, image_hashes = list[RenderedConversation](), list[bytes](), list[str]()
    annotations = list[bytes]()

    def finish() -> Chunk:
        nonlocal previous_tally, texts, conversations, images, image_hashes, annotations
        nonlocal bad_entries, size, chunk_number
        if bad_entries:
            replace_file(quarantine_file(quarantine, file_number, chunk_number), "".join(bad_entries).encode())
        tally = reader.tally.counts_since(previous_tally)
        has_images = any(image_hashes)
        chunk = Chunk(
            file_number,
            chunk_number,
            texts,
            tally,
            is_aborted,
            conversations or None,
            images if has_images else None,
            image_hashes if has_images else None,
            annotations if any(annotations) else None,
        )
        previous_tally, texts, conversations = reader.tally.copy(), [], []
        images, image_hashes, annotations = [], [], []
        bad_entries, size, chunk_number = [], 0, chunk_number + 1
        return chunk

    for item in reader:
        if isinstance(item, Document):
            texts.append(item.text)
            images.append(item.image or b"")
            image_hashes.append(item.image_hash or "")
            annotations.append(item.annotation or b"")
            size += len(item.text) + len(item.image or b"") + len(item.annotation or b"")
            if item.conversation is not None:
                conversations.append(item.conversation)
        else:
            bad_entries.append(quarantine_entry(file.domain, item))
            # A fixed size is added instead of the entry's length, which depends on the names of folders: the division
            # of a file into chunks must depend on the file alone.
            size += BAD_LINE_CHARACTERS
            is_aborted = limit.will_be_exceeded(reader.tally)
            if is_aborted:
                break
        if size >= characters:
            yield finish()
    # The last chunk is yielded even without items: its tally counts the file and the bytes at its end.
    yield finish()


def quarantine_file(folder: Path, file: int, chunk: int) -> Path:
    """Return the path of the file with the unreadable lines of one chunk."""
    return folder / f"{file:07d}-{chunk:07d}.jsonl"
