"""Items that reading raw files yields: documents, and lines that could not be read, with their place and reason."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from mhmoe_ray.spec import Format

_PACKED = (".gz", ".zst", ".parquet")
_PACKED_TIMES = 3


class RawFile(NamedTuple):
    domain: str
    """Domain of the file, <source>/<subfolder>, for example redpajama/book."""
    path: str
    """Local path of the file, or its URI without the query."""
    size: int
    """Size of the file in bytes, when it was listed."""
    format: Format

    @property
    def inflation(self) -> int:
        """Bytes of text per stored byte, roughly, by the file's name."""
        return _PACKED_TIMES if self.path.endswith(_PACKED) else 1


class Document(NamedTuple):
    text: str
    """Text of the document, never empty and always valid Unicode."""
    line: int
    """Number of the document's line, row, or first line, from 1."""
    language: str | None = None
    """Language that the document's record names; None if it names none."""


class Reason(StrEnum):
    """Reason why something is in quarantine."""

    NOT_UTF8 = "it is not UTF-8"
    NOT_JSON = "it is not JSON"
    NUL_BYTES = "it holds NUL bytes"
    NO_TEXT = "it has no text"
    EMPTY = "its text is empty"
    SURROGATE = "its text holds half a character (a lone surrogate)"
    TOO_LONG = "it is longer than data.max_document_mb"
    NO_SIGNALS = "it cannot be judged by its signals"
    LOST = "a part of the file is lost"

    @property
    def loses_lines(self) -> bool:
        """Whether an item with this reason stands for an unknown number of documents."""
        return self is Reason.LOST


class BadLine(NamedTuple):
    path: str
    line: int
    """Number of the line, row, or first line, from 1; for a lost part, the first line or row that is lost."""
    reason: Reason
    detail: str = ""

    @property
    def why(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else str(self.reason)


class DamageError(Exception):
    """Error that ends reading a damaged file: everything before the damage was read."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.rest = b""
        """The beginning of the last line, which the damage cut off."""


@dataclass
class Tally:
    """Counts of what has been read from raw files. Tallies add up with `+=`."""

    files: int = 0
    """Number of files that were read to their end, or to where they are damaged."""
    damaged: int = 0
    """Number of those files of which a part is lost."""
    bytes_read: int = 0
    """Bytes read, as stored."""
    text_bytes: int = 0
    """Bytes of text that were read, estimated by each file's `inflation`."""
    documents: int = 0
    bad: Counter[Reason] = field(default_factory=Counter)
    """Number of quarantined items, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of documents that a source's filters dropped, by rule."""
    first: dict[Reason, BadLine] = field(default_factory=dict)
    """One item of each reason, to show as an example."""

    def count_bad(self, bad: BadLine) -> None:
        self.bad[bad.reason] += 1
        self.first.setdefault(bad.reason, bad)

    @property
    def bad_lines(self) -> int:
        """Number of lines that could not be read, without lost parts, whose lines cannot be counted."""
        return sum(n for reason, n in self.bad.items() if not reason.loses_lines)

    @property
    def lines(self) -> int:
        return self.documents + self.bad_lines + self.dropped.total()

    def since(self, before: "Tally") -> "Tally":
        """Return what was counted after `before`, an earlier state of this tally.

        The result has all examples in `first`, since it is not known in which order such tallies will be added up.
        """
        return Tally(
            self.files - before.files,
            self.damaged - before.damaged,
            self.bytes_read - before.bytes_read,
            self.text_bytes - before.text_bytes,
            self.documents - before.documents,
            self.bad - before.bad,
            self.dropped - before.dropped,
            dict(self.first),
        )

    def copy(self) -> "Tally":
        return Tally().__iadd__(self)

    def __iadd__(self, other: "Tally") -> "Tally":
        self.files += other.files
        self.damaged += other.damaged
        self.bytes_read += other.bytes_read
        self.text_bytes += other.text_bytes
        self.documents += other.documents
        self.bad += other.bad
        self.dropped += other.dropped
        self.first = other.first | self.first
        return self
