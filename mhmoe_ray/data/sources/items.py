"""Items of raw files: documents, and lines that could not be read, with their location and reason."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from mhmoe_ray.data.chat.template import RenderedConversation
from mhmoe_ray.spec import DataSpec, Format

_COMPRESSED_SUFFIXES = (".gz", ".zst", ".parquet")
# These are the bytes of text per byte of a compressed file. A rough number suffices, since it only serves to estimate
# sizes.
_COMPRESSION_RATIO = 3


class RawFile(NamedTuple):
    """File of raw text or of pictures, or some of the images of a folder."""

    domain: str
    """Domain of the file, <source>/<subfolder>, for example redpajama/book."""
    path: str
    """Local path of the file or folder, or its URI without the query."""
    size: int
    """Size of the file, or of all images, in bytes, when it was listed."""
    format: Format
    members: tuple[str, ...] = ()
    """Paths of the images of a folder (format `images`), relative to `path`; empty for a single file."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "RawFile":
        """Return the file in a row of a table that `find.file_blocks` made."""
        file = cls(*(row[name] for name in cls._fields))
        return file._replace(members=tuple(file.members))

    @property
    def stored_paths(self) -> list[str]:
        """Paths of all stored files: of the images of a folder, or `path`."""
        return [f"{self.path}/{member}" for member in self.members] or [self.path]

    @property
    def inflation(self) -> int:
        """Estimated bytes of text per stored byte: 3 for a file with a compressed format's suffix, otherwise 1."""
        return _COMPRESSION_RATIO if self.path.endswith(_COMPRESSED_SUFFIXES) else 1


class Document(NamedTuple):
    """Document that was read from a raw file."""

    text: str
    """Text of the document, always valid Unicode. It is empty only if the document is an image alone."""
    line: int
    """Number of the document's line, row, member, or first line, from 1."""
    language: str | None = None
    """Language that the document's record names; None if it names none."""
    conversation: RenderedConversation | None = None
    """The document as the chat template renders it, if it is a conversation; `text` then has the contents of its
    messages."""
    image: bytes | None = None
    """Image of the document, the encoded file as it is stored; None if it has none."""
    image_hash: str | None = None
    """Hash of the image of the document's record, also if the source uses only the text; None if it has none. All
    documents of one image have the same hash, so that they are on the same side of the validation split."""
    annotation: bytes | None = None
    """Class or objects of the image (`data.vision.annotations.pack`), if the source has a column of them; otherwise
    None."""

    @property
    def model_text(self) -> str:
        """Text that a model reads: that of the rendered conversation, otherwise the text itself."""
        return self.text if self.conversation is None else self.conversation.text


class Reason(StrEnum):
    """Reason why something is in quarantine."""

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
        """True if an item with this reason stands for an unknown number of documents instead of one line."""
        return self is Reason.PART_LOST


class Fault(NamedTuple):
    """Reason why an image or a text cannot be used."""

    reason: Reason
    detail: str = ""


class ReadSettings(NamedTuple):
    """Settings of the data section for the documents of a source."""

    document_bytes: int
    """Largest size of a document in bytes, as it is stored."""
    pixels: int
    """Largest number of pixels of an image."""
    hashes_images: bool
    """True if some source has images. Then the documents of a source of texts, too, have the hashes of the images in
    their records."""
    image_columns: tuple[str, ...]
    """Names under which the source's files may have a column of images (`DataSpec.image_columns`)."""

    @classmethod
    def from_spec(cls, spec: DataSpec, source: str) -> "ReadSettings":
        """Return the settings for the files of a source, by its name."""
        document_bytes, pixels = int(spec.max_document_mb * 1e6), int(spec.images.max_megapixels * 1e6)
        return cls(document_bytes, pixels, spec.has_images, spec.image_columns(source))


class BadLine(NamedTuple):
    """Line, row, member or part of a raw file that could not be read."""

    path: str
    line: int
    """Number of the line, row, member, or first line, from 1; for a lost part, the first one that is lost."""
    reason: Reason
    detail: str = ""

    @property
    def message(self) -> str:
        """Reason with its detail, for the user."""
        return f"{self.reason} ({self.detail})" if self.detail else str(self.reason)


class DamageError(Exception):
    """Error that ends the reading of a damaged file, after everything before the damage was read."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cut_off_line = b""
        """Beginning of the last line, which the damage cut off."""


@dataclass
class Tally:
    """Counts of the items that were read from raw files. Tallies add up with `+=`."""

    files: int = 0
    """Number of files that were read to their end or to a damage."""
    damaged: int = 0
    """Number of those files that have lost a part."""
    bytes_read: int = 0
    """Bytes read, as stored."""
    text_bytes: int = 0
    """Bytes of text that were read, estimated by each file's `inflation`."""
    documents: int = 0
    bad: Counter[Reason] = field(default_factory=Counter)
    """Number of quarantined items, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of documents that a source's filters dropped, by rule."""
    examples: dict[Reason, BadLine] = field(default_factory=dict)
    """One item of each reason, to show as an example."""

    def count_bad(self, bad: BadLine) -> None:
        """Count an item that could not be read; the first one of each reason becomes the example."""
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
        """Return the counts that were added to this tally since it was equal to `earlier_tally`.

        The result has all examples of this tally, also earlier ones.
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
        """Return a tally with the same counts that does not change with this one."""
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
