"""Items that the readers of raw files yield: documents, and unreadable lines with their location and the reason."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from mhmoe_ray.data.chat.template import RenderedConversation
from mhmoe_ray.spec import DataSpec, Format

_COMPRESSED_SUFFIXES = (".gz", ".zst", ".parquet")
# Assumed bytes of text per byte of a compressed file. A rough number suffices, since it only serves to estimate sizes.
_COMPRESSION_RATIO = 3


class RawFile(NamedTuple):
    """File of raw text or pictures to read. For format `images`, it is a group of image files below one folder."""

    domain: str
    """Domain of the file, <source>/<subfolder>, for example redpajama/book."""
    path: str
    """Local path of the file or folder, or its URI without the query."""
    size: int
    """Size in bytes of the file, or of all images of the group, at the time when the source was listed."""
    format: Format
    members: tuple[str, ...] = ()
    """Paths of the images of a folder (format `images`), relative to `path`; empty for a single file."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "RawFile":
        """Return the raw file that one row of a table from `find.file_blocks` describes."""
        file = cls(*(row[name] for name in cls._fields))
        return file._replace(members=tuple(file.members))

    @property
    def stored_paths(self) -> list[str]:
        """Paths of the stored files: one path for each image of a group, or `path` alone for a single file."""
        return [f"{self.path}/{member}" for member in self.members] or [self.path]

    @property
    def inflation(self) -> int:
        """Estimated bytes of text per stored byte: 3 if the path ends in .gz, .zst or .parquet, otherwise 1."""
        return _COMPRESSION_RATIO if self.path.endswith(_COMPRESSED_SUFFIXES) else 1


class Document(NamedTuple):
    """Document that was read from a raw file: a text, a conversation, or an image with or without a caption."""

    text: str
    """Text of the document, always valid Unicode. It is empty only if the document is an image without a caption."""
    line: int
    """Position of the document in its file, from 1: usually the number of its first line, table row or tar member."""
    language: str | None = None
    """Language that the stored record gives for the document; None if it gives none."""
    conversation: RenderedConversation | None = None
    """Conversation as the chat template renders it; None if the document is no conversation. In a conversation, `text`
    has only the contents of the messages."""
    image: bytes | None = None
    """Image of the document as an encoded file, such as JPEG; None if the document has no image."""
    image_hash: str | None = None
    """Hash of the image in the document's record, even if the source uses only the text of the record. All documents of
    one image have the same hash, so that they are on the same side of the validation split. None if there is no image
    to hash."""
    annotation: bytes | None = None
    """Class or objects of the image, encoded by `data.vision.annotations.pack`; None if the source's samples have
    neither."""

    @property
    def model_text(self) -> str:
        """Text that a model reads: the rendered conversation if the document is one, otherwise `text`."""
        return self.text if self.conversation is None else self.conversation.text


class Reason(StrEnum):
    """Reason why a line, an image or a part of a file is in the quarantine, the list of what could not be read."""

    NOT_UTF8 = "it is not UTF-8"
    NOT_JSON = "it is not JSON"
    NUL_BYTES = "it holds NUL bytes"
    NO_TEXT = "it has no text"
    EMPTY = "its text is empty"
    SURROGATE = "its text holds half a character (a lone surrogate)"
    TOO_LONG = "it is longer than data.max_document_mb"
    NO_CONVERSATION = "it is not a conversation"
    NO_RENDERING = "the chat template does not render it"
    NO_IMAGE = "it has no image"
    NOT_IMAGE = "it is not an image"
    TOO_MANY_PIXELS = "its image has more pixels than data.images.max_megapixels"
    IMAGE_LIMIT = "its image exceeds a fixed limit"
    DAMAGED_IMAGE = "its image is damaged"
    NO_CLASS = "it has no class"
    BAD_OBJECT = "its object cannot be used"
    NO_SIGNALS = "it cannot be judged by its signals"
    PART_LOST = "a part of the file is lost"

    @property
    def loses_lines(self) -> bool:
        """True if the reason is a lost part of a file, in which the number of lines or documents is unknown."""
        return self is Reason.PART_LOST


class Fault(NamedTuple):
    """Reason why an image, a text or a class in a record cannot be used."""

    reason: Reason
    detail: str = ""


class ReadSettings(NamedTuple):
    """Settings that readers of a source's files need from the data section of a spec, such as size limits."""

    document_bytes: int
    """Largest size in bytes of a stored document or image; a larger one counts as unreadable."""
    pixels: int
    """Largest number of pixels of an image; a larger image counts as unreadable."""
    hashes_images: bool
    """True if any source of the spec has images. Readers of sources of texts then hash the images in their records,
    too, so that the validation split keeps the documents of one image together."""
    image_columns: tuple[str, ...]
    """Names to try for the column of images in the source's files, the likeliest first (`DataSpec.image_columns`)."""

    @classmethod
    def from_spec(cls, spec: DataSpec, source: str) -> "ReadSettings":
        """Return the settings of a data section for the source of this name."""
        document_bytes, pixels = int(spec.max_document_mb * 1e6), int(spec.images.max_megapixels * 1e6)
        return cls(document_bytes, pixels, spec.has_images, spec.image_columns(source))


class BadLine(NamedTuple):
    """Line, table row, tar member or part of a raw file that could not be read, with the reason."""

    path: str
    line: int
    """Position in the file, from 1, as in `Document.line`; for a lost part of the file, where this part begins."""
    reason: Reason
    detail: str = ""

    @property
    def message(self) -> str:
        """Reason and its detail as one text, which users see."""
        return f"{self.reason} ({self.detail})" if self.detail else str(self.reason)


class DamageError(Exception):
    """Error that ends the reading of a damaged file, after everything before the damage was read."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cut_off_line = b""
        """Beginning of the line that the damage cut off."""


@dataclass
class Tally:
    """Counts of what was read from raw files: bytes, documents and unreadable lines. `+=` adds another tally."""

    files: int = 0
    """Number of files that were read to their end, or to the place where they are damaged."""
    damaged: int = 0
    """Number of damaged files, of which a part could not be read; `files` includes them."""
    bytes_read: int = 0
    """Bytes that were read from storage, before decompression."""
    text_bytes: int = 0
    """Estimated bytes of text that were read: stored bytes times the `RawFile.inflation` of each file."""
    documents: int = 0
    bad: Counter[Reason] = field(default_factory=Counter)
    """Number of unreadable items (lines, images or parts of files), by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of documents that a source's filters dropped, by the name of the rule."""
    examples: dict[Reason, BadLine] = field(default_factory=dict)
    """One unreadable item for each reason, as an example that users see."""

    def count_bad(self, bad: BadLine) -> None:
        """Count an unreadable item; the first one with each reason becomes the example of this reason."""
        self.bad[bad.reason] += 1
        self.examples.setdefault(bad.reason, bad)

    @property
    def bad_lines(self) -> int:
        """Number of lines that could not be read; lost parts of files are not counted."""
        return sum(n for reason, n in self.bad.items() if not reason.loses_lines)

    @property
    def lines(self) -> int:
        """Number of all lines: documents, lines that could not be read, and dropped documents."""
        return self.documents + self.bad_lines + self.dropped.total()

    def counts_since(self, earlier_tally: "Tally") -> "Tally":
        """Return the counts that were added since `earlier_tally`, which is an earlier copy of this tally.

        The result has all examples of this tally, including those of the earlier copy.
        """
        return Tally(
            self.files - earlier_tally.files,
            self.damaged - earlier_tally.damaged,
            self.bytes_read - earlier_tally.bytes_read,
            self.text_bytes - earlier_tally.text_bytes,
            self.documents - earlier_tally.documents,
            self.bad - earlier_tally.bad,
            self.dropped - earlier_tally.dropped,
            dict(self.examples),
        )

    def copy(self) -> "Tally":
        """Return a copy of these counts, which stays the same when this tally changes."""
        return Tally().__iadd__(self)

    def __iadd__(self, addend: "Tally") -> "Tally":
        self.files += addend.files
        self.damaged += addend.damaged
        self.bytes_read += addend.bytes_read
        self.text_bytes += addend.text_bytes
        self.documents += addend.documents
        self.bad += addend.bad
        self.dropped += addend.dropped
        self.examples = addend.examples | self.examples
        return self
