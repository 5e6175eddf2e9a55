"""What reading raw files gives: documents, and what could not be read, with its place and reason."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from mhmoe_ray.spec import Format

_PACKED = (".gz", ".zst", ".parquet")
_PACKED_TIMES = 3


class RawFile(NamedTuple):
    domain: str
    """<source>/<subfolder>, for example redpajama/book."""
    path: str
    """Local, or a URI without its query."""
    size: int
    """In bytes, when it was listed."""
    format: Format

    @property
    def inflation(self) -> int:
        """About so many bytes of text are a stored byte, by the file's name."""
        return _PACKED_TIMES if self.path.endswith(_PACKED) else 1


class Document(NamedTuple):
    text: str
    """Never empty, always valid Unicode."""
    line: int
    """Its line, row, or first line, from 1."""
    language: str | None = None
    """As its record names it."""


class Reason(StrEnum):
    """Why something is in quarantine."""

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
        """Whether it stands for an unknown number of documents."""
        return self is Reason.LOST


class BadLine(NamedTuple):
    path: str
    line: int
    """Its line, row, or first line, from 1; of lost parts the first line or row that is lost."""
    reason: Reason
    detail: str = ""

    @property
    def why(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else str(self.reason)


class DamageError(Exception):
    """No more can be read of a file; everything before was."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.rest = b""
        """The last line's beginning."""


@dataclass
class Tally:
    """What has come of raw files so far. Sums with `+=`."""

    files: int = 0
    """Read to their end, or to where they are damaged."""
    damaged: int = 0
    """Of these, files of which a part is lost."""
    bytes_read: int = 0
    """As stored."""
    text_bytes: int = 0
    """About so many are those of text, by each file's `inflation`."""
    documents: int = 0
    bad: Counter[Reason] = field(default_factory=Counter)
    """What is in quarantine, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What a source's filters left out, by rule."""
    first: dict[Reason, BadLine] = field(default_factory=dict)
    """One of each reason, to show."""

    def count_bad(self, bad: BadLine) -> None:
        self.bad[bad.reason] += 1
        self.first.setdefault(bad.reason, bad)

    @property
    def bad_lines(self) -> int:
        """Without lost parts, whose lines nobody can count."""
        return sum(n for reason, n in self.bad.items() if not reason.loses_lines)

    @property
    def lines(self) -> int:
        return self.documents + self.bad_lines + self.dropped.total()

    def since(self, before: "Tally") -> "Tally":
        """What was counted after `before`, an earlier state of this tally; with all that there is to show, since nobody
        knows which of them is added up first."""
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
