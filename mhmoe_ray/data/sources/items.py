"""Items that the readers of raw files yield: documents, and unreadable lines with the reason."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple

from mhmoe_ray.data.chat.template import RenderedConversation
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec, Format

_COMPRESSED_SUFFIXES = (".gz", ".zst", ".parquet")
# Assumed bytes of text per byte of a compressed file. A rough number suffices, since it only serves to estimate sizes.
_COMPRESSION_RATIO = 3


class RawFile(NamedTuple):
    """File to read; for format `images`, a group of image files below one folder."""

    domain: str
    """Domain, for example redpajama/book for <source>/<subfolder>."""
    path: str
    """Local path of the file or folder, or its URI without the query."""
    size: int
    """Bytes of the file or group when the source was listed."""
    format: Format
    members: tuple[str, ...] = ()
    """Paths of a group's images, relative to `path`."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "RawFile":
        """Return the raw file in a row of a table from `find.file_blocks`."""
        file = cls(*(row[name] for name in cls._fields))
        return file._replace(members=tuple(file.members))

    @property
    def stored_paths(self) -> list[str]:
        """Paths of a group's images, or `path` alone."""
        return [f"{self.path}/{member}" for member in self.members] or [self.path]

    @property
    def inflation(self) -> int:
        """Estimated bytes of text per stored byte."""
        return _COMPRESSION_RATIO if self.path.endswith(_COMPRESSED_SUFFIXES) else 1


class Document(NamedTuple):
    """Text, conversation, or image with or without a caption."""

    text: str
    """Valid Unicode; it is empty only for an image without a caption."""
    line: int
    """Position in its file, from 1: usually its first line, table row or tar member."""
    language: str | None = None
    """Language that the stored record gives."""
    conversation: RenderedConversation | None = None
    """Conversation as the chat template renders it; `text` then has only the contents of the messages."""
    image: bytes | None = None
    """Image as an encoded file."""
    image_hash: str | None = None
    """Hash of the record's image, also if the source uses only texts: the validation split keeps an image's documents
    together."""
    annotation: bytes | None = None
    """Class or objects of the image, or answers to the text, encoded by `data.images.annotations.pack`."""
    second_image: bytes | None = None
    """Second image, if the text is a sentence about two."""
    lines: int = 1
    """Number of lines that it takes from `line` on; more than 1 only in plain text."""
    name: str = ""
    """Name of its file in a folder of images, or of its sample in a tar file; else empty."""
    rejected: RenderedConversation | None = None
    """Conversation with the rejected answer, if the document is a pair; `conversation` then has the chosen one."""

    @property
    def model_text(self) -> str:
        """Text that a model reads: the rendered conversation, or else `text`."""
        return self.text if self.conversation is None else self.conversation.text


class Reason(StrEnum):
    """Reason why a line, an image or a part of a file is in the quarantine."""

    NOT_UTF8 = "it is not UTF-8"
    NOT_JSON = "it is not JSON"
    NUL_BYTES = "it holds NUL bytes"
    NO_TEXT = "it has no text"
    EMPTY = "its text is empty"
    SURROGATE = "its text holds half a character (a lone surrogate)"
    TOO_LONG = "it is longer than data.max_document_mb"
    NO_CONVERSATION = "it is not a conversation"
    NO_PAIR = "it is not a pair of answers"
    NO_RENDERING = "the chat template does not render it"
    NO_IMAGE = "it has no image"
    NOT_IMAGE = "it is not an image"
    TOO_MANY_PIXELS = "its image has more pixels than data.images.max_megapixels"
    IMAGE_LIMIT = "its image exceeds a fixed limit"
    DAMAGED_IMAGE = "its image is damaged"
    NO_CLASS = "it has no class"
    NO_ANSWER = "it has no usable answers"
    BAD_OBJECT = "its object cannot be used"
    NO_SIGNALS = "it cannot be judged by its signals"
    PART_LOST = "a part of the file is lost"

    @property
    def loses_lines(self) -> bool:
        """True if a part of a file is lost, in which the number of lines or documents is unknown."""
        return self is Reason.PART_LOST


class Fault(NamedTuple):
    """Reason why an image, a text or a class cannot be used."""

    reason: Reason
    detail: str = ""


class ReadSettings(NamedTuple):
    """Settings that readers of a source need."""

    document_bytes: int
    """Largest size in bytes of a stored document or image."""
    pixels: int
    """Largest number of pixels of an image."""
    hashes_images: bool
    """True if any source of the spec has images: sources of texts then fill `Document.image_hash`, too."""
    image_columns: tuple[str, ...]
    """Names to try for the column of images, in this order."""

    @classmethod
    def from_spec(cls, spec: DataSpec, source: str) -> "ReadSettings":
        """Return the settings for the source of this name."""
        document_bytes, pixels = int(spec.max_document_mb * 1e6), int(spec.images.max_megapixels * 1e6)
        return cls(document_bytes, pixels, spec.has_images, spec.image_columns(source))


class BadLine(NamedTuple):
    """Line, table row, tar member or part of a raw file that could not be read."""

    path: str
    line: int
    """Position as in `Document.line`; a lost part begins there."""
    reason: Reason
    detail: str = ""

    @property
    def message(self) -> str:
        """Reason with its detail, as users see it."""
        return f"{self.reason} ({self.detail})" if self.detail else str(self.reason)

    def damage_error(self, damaged: int, max_damaged: int) -> DataError:
        """Return the error about too many damaged files, of which this is one."""
        reason = f"{self.message} ({damaged:,} damaged files so far, data.max_bad_files is {max_damaged:,})"
        fix = "repair or remove the file, or raise data.max_bad_files"
        return DataError(f"{self.path} line {self.line}", reason, fix)


class DamageError(Exception):
    """Error that ends the reading of a damaged file, after everything before the damage."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cut_off_line = b""
        """Beginning of the line that the damage cut off."""


@dataclass
class Tally:
    """Counts of what was read from raw files; `+=` adds another tally."""

    files: int = 0
    """Files read to their end or to their damage."""
    damaged: int = 0
    """Those of the files of which a part is lost."""
    bytes_read: int = 0
    """Bytes read from storage, before decompression."""
    text_bytes: int = 0
    """Bytes of text, as `RawFile.inflation` estimates them."""
    documents: int = 0
    bad: Counter[Reason] = field(default_factory=Counter)
    """Unreadable lines, images or parts of files, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents that filters dropped, by the name of the rule."""
    examples: dict[Reason, BadLine] = field(default_factory=dict)

    def count_bad(self, bad: BadLine) -> None:
        """Count an unreadable item; the first with each reason becomes its example for users."""
        self.bad[bad.reason] += 1
        self.examples.setdefault(bad.reason, bad)

    @property
    def bad_lines(self) -> int:
        """Number of lines that could not be read, without lost parts of files."""
        return sum(n for reason, n in self.bad.items() if not reason.loses_lines)

    @property
    def lines(self) -> int:
        """Number of documents, unreadable lines and dropped documents."""
        return self.documents + self.bad_lines + self.dropped.total()

    def counts_since(self, earlier_tally: "Tally") -> "Tally":
        """Return the counts added since an earlier copy of this tally, with all examples."""
        counts = {name: getattr(self, name) - getattr(earlier_tally, name) for name in self._count_names()}
        return Tally(**counts, examples=dict(self.examples))

    def copy(self) -> "Tally":
        """Return an independent copy of these counts."""
        return Tally().__iadd__(self)

    def __iadd__(self, addend: "Tally") -> "Tally":
        for name in self._count_names():
            setattr(self, name, getattr(self, name) + getattr(addend, name))
        self.examples = addend.examples | self.examples
        return self

    @classmethod
    def _count_names(cls) -> list[str]:
        return [count.name for count in fields(cls) if count.name != "examples"]
