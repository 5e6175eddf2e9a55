"""Reader of folders of image files, and the checks that all readers of images share."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mhmoe_ray.data.images.annotations import Annotation, pack
from mhmoe_ray.data.images.files import ImageError, ImageLimitError, NotImageError, TooManyPixelsError, check_image_file
from mhmoe_ray.data.sources.items import BadLine, Document, Fault, RawFile, ReadSettings, Reason, Tally
from mhmoe_ray.data.sources.records import BOM, text_problem
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import SourceSpec
from mhmoe_ray.spec.formats import Column
from mhmoe_ray.storage import short_message

if TYPE_CHECKING:
    from PIL import Image


def check_image(image: bytes | Fault | None, settings: ReadSettings) -> bytes | Fault:
    """Return an image file if it can be used, otherwise the reason why it cannot; None stands for a missing image."""
    decoded_image = decode_checked_image(image, settings)
    if isinstance(decoded_image, Fault):
        return decoded_image
    assert isinstance(image, bytes)
    return image


def decode_checked_image(image: bytes | Fault | None, settings: ReadSettings) -> "Image.Image | Fault":
    """Return the decoded image, turned upright, or the reason why it cannot be used."""
    if image is None:
        return Fault(Reason.NO_IMAGE)
    if isinstance(image, Fault):
        return image
    if len(image) > settings.document_bytes:
        return Fault(Reason.TOO_LONG, f"{len(image):,} bytes")
    try:
        return check_image_file(image, settings.pixels)
    except NotImageError:
        return Fault(Reason.NOT_IMAGE)
    except TooManyPixelsError as e:
        return Fault(Reason.TOO_MANY_PIXELS, str(e))
    except ImageLimitError as e:
        return Fault(Reason.IMAGE_LIMIT, str(e))
    except ImageError as e:
        return Fault(Reason.DAMAGED_IMAGE, str(e))


def decode_caption(content: bytes, subject: str = "caption") -> str | Fault:
    """Decode a file with a caption or class (`subject`) without byte order mark and last line break."""
    try:
        return content.removeprefix(BOM).removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as e:
        return Fault(Reason.NOT_UTF8, f"byte {e.start + 1} of the {subject}")


def class_annotation(class_name: str | Fault) -> bytes | Fault:
    """Return the encoded annotation of an image of this class, or the reason why the class cannot be used."""
    if isinstance(class_name, Fault):
        return class_name
    match text_problem(class_name):
        case None:
            return pack(Annotation(class_name))
        case Reason.EMPTY:
            return Fault(Reason.NO_CLASS, "its name is empty")
        case reason:
            return Fault(reason, "the name of the class")


def image_hash(image: bytes) -> str:
    """Return the hash by which documents with the same image are recognised."""
    return hashlib.blake2b(image, digest_size=16).hexdigest()


def image_document(
    path: str,
    line: int,
    label: str,
    image: bytes | Fault | None,
    caption: str | Fault | None,
    columns: Sequence[Column],
    language: str | None = None,
    annotation: bytes | Fault | None = None,
) -> Document | BadLine:
    """Return a document of an image, a text or both, as `columns` selects, or a `BadLine` with the reason.

    `label` names the record in error messages and may be empty. If `columns` has the image, `check_image` has checked
    it. `annotation` is None if the source's samples have neither a class nor objects.
    """

    def bad_line(reason: Reason, detail: str = "") -> BadLine:
        return BadLine(path, line, reason, ": ".join(part for part in (label, detail) if part))

    if "image" in columns and not isinstance(image, bytes):
        return bad_line(*(image or (Reason.NO_IMAGE, "")))
    if isinstance(annotation, Fault):
        return bad_line(*annotation)
    text = ""
    if "text" in columns:
        if not isinstance(caption, str):
            return bad_line(*(caption or (Reason.NO_TEXT, "")))
        text = caption
        if reason := text_problem(text):
            return bad_line(reason)
    content = image if isinstance(image, bytes) else None
    return Document(
        text,
        line,
        language,
        image=content if "image" in columns else None,
        image_hash=None if content is None else image_hash(content),
        annotation=annotation,
    )


def read_images(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the image files of a folder as documents.

    `Document.line` is the number of the image within the `RawFile`. An image that cannot be used is reported as line 1
    of its own file. If the source has classes, the class of an image is the first folder of its path below the source.
    """
    has_class = "class" in source.sample_columns
    for number, (path, member) in enumerate(zip(file.stored_paths, file.members, strict=True), start=1):
        try:
            image = storage.read_bytes(path, settings.document_bytes)
        except OSError as e:
            is_missing = isinstance(e, FileNotFoundError)
            yield BadLine(path, 1, Reason.PART_LOST, "it no longer exists" if is_missing else short_message(e))
            continue
        tally.bytes_read += len(image or b"")
        checked_image = Fault(Reason.TOO_LONG) if image is None else check_image(image, settings)
        annotation = class_annotation(_folder_class(member)) if has_class else None
        columns = source.sample_columns
        item = image_document(path, number, "", checked_image, None, columns, annotation=annotation)
        yield item._replace(line=1) if isinstance(item, BadLine) else item._replace(name=member)


def _folder_class(member: str) -> str | Fault:
    folder, slash, _ = member.partition("/")
    return folder if slash else Fault(Reason.NO_CLASS, "it is in no folder of a class")
