"""Readers of folders of image files and of COCO's captions, and the checks that all readers of pictures share.

COCO's JSON has `images`, a list of {id, file_name}, and `annotations`, a list of {image_id, caption}. The document of
an annotation is its caption and its image. If a source uses only the images, each image is one document. Images are
looked for under `file_name` in four folders: the folder of the JSON file and its parent, then in both the folder that
is named like the split, the last word of the file's name (`train2017` for `captions_train2017.json`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from mhmoe_ray.data.images import ImageError, NotImageError, TooManyPixelsError, check_image_file
from mhmoe_ray.data.sources.compression import decompress
from mhmoe_ray.data.sources.items import BadLine, DamageError, Document, Fault, RawFile, ReadSettings, Reason, Tally
from mhmoe_ray.data.sources.records import BOM, json_type, text_problem
from mhmoe_ray.data.sources.storage import Storage, short_message
from mhmoe_ray.spec import SourceSpec
from mhmoe_ray.spec.data import Column


def check_image(image: bytes | Fault | None, settings: ReadSettings) -> bytes | Fault:
    """Return the content of an image file if it can be used, otherwise the reason why it cannot.

    Args:
        image: the content, the reason why it could not be read, or None if there is no image.
        settings: the limits of documents and images.
    """
    if image is None:
        return Fault(Reason.NO_IMAGE)
    if isinstance(image, Fault):
        return image
    if len(image) > settings.document_bytes:
        return Fault(Reason.TOO_LONG, f"{len(image):,} bytes")
    try:
        check_image_file(image, settings.pixels)
    except NotImageError:
        return Fault(Reason.NOT_IMAGE)
    except TooManyPixelsError as e:
        return Fault(Reason.TOO_MANY_PIXELS, str(e))
    except ImageError as e:
        return Fault(Reason.DAMAGED_IMAGE, str(e))
    return image


def decode_caption(content: bytes) -> str | Fault:
    """Return the text of a caption's file, without a byte order mark and without the last line break."""
    try:
        return content.removeprefix(BOM).removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as e:
        return Fault(Reason.NOT_UTF8, f"byte {e.start + 1} of the caption")


def image_hash(image: bytes) -> str:
    """Return the hash by which documents of the same image are recognised."""
    return hashlib.blake2b(image, digest_size=16).hexdigest()


def picture_document(
    path: str,
    line: int,
    label: str,
    image: bytes | Fault | None,
    caption: str | Fault | None,
    columns: Sequence[Column],
    language: str | None = None,
) -> Document | BadLine:
    """Return a record with an image, a caption or both as a document, or the reason why it cannot be used.

    Args:
        path: the path of the file.
        line: the number of the record within the file.
        label: the name of the record in its file, for the user; may be empty.
        image: the image, from `check_image` if the document has it; the reason why it cannot be used, or None.
        caption: the caption, the reason why it cannot be used, or None if the document has none.
        columns: the columns of the source's samples.
        language: the language of the caption; None if the record does not name it.
    """

    def bad_line(reason: Reason, detail: str = "") -> BadLine:
        return BadLine(path, line, reason, ": ".join(part for part in (label, detail) if part))

    if "image" in columns and not isinstance(image, bytes):
        return bad_line(*(image or (Reason.NO_IMAGE, "")))
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
    )


def read_images(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the image files of a folder as documents; see `reading.FormatReader` for the arguments.

    The number of a document is that of its image within the `RawFile`. An image that cannot be used is line 1 of its
    own file.
    """
    for number, path in enumerate(file.stored_paths, start=1):
        try:
            image = storage.read_bytes(path, settings.document_bytes)
        except OSError as e:
            is_missing = isinstance(e, FileNotFoundError)
            yield BadLine(path, 1, Reason.PART_LOST, "it no longer exists" if is_missing else short_message(e))
            continue
        tally.bytes_read += len(image or b"")
        checked_image = Fault(Reason.TOO_LONG) if image is None else check_image(image, settings)
        item = picture_document(path, number, "", checked_image, None, source.sample_columns)
        yield item._replace(line=1) if isinstance(item, BadLine) else item


class _Annotation(NamedTuple):
    """Caption of an image in COCO's JSON."""

    number: int
    """Number of the annotation within the file, from 1."""
    caption: str | Fault


def read_coco(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the annotations of a JSON file of COCO's captions as documents, image by image.

    The number of a document is that of its annotation; of an image without caption, or if only images are used, it is
    the number of the image. See `reading.FormatReader` for the arguments.
    """
    try:
        # The bytes are counted below, image by image, because the images take most of the time.
        content = b"".join(decompress(storage.chunks(file, Tally()), file.path))
        images, annotations = _parse_coco(content)
    except DamageError as damage:
        yield BadLine(file.path, 1, Reason.PART_LOST, damage.reason)
        return
    del content
    columns, finder = source.sample_columns, _ImageFinder(storage, file.path)
    by_image: dict[Any, list[_Annotation]] = defaultdict(list)
    known_ids = {entry.get("id") for entry in images if isinstance(entry, dict) and _is_id(entry.get("id"))}
    if "text" in columns:
        for number, entry in enumerate(annotations, start=1):
            image_id: Any = entry.get("image_id") if isinstance(entry, dict) else None
            if not _is_id(image_id) or image_id not in known_ids:
                yield BadLine(file.path, number, Reason.NO_IMAGE, f"image_id {image_id!r} is not among its images")
                continue
            caption = entry.get("caption")
            if not isinstance(caption, str):
                caption = Fault(Reason.NO_TEXT, f"its caption is {json_type(caption)}")
            by_image[image_id].append(_Annotation(number, caption))
    for number, entry in enumerate(images, start=1):
        tally.bytes_read = file.size * number // len(images)
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _is_id(entry.get("id")):
            yield BadLine(file.path, number, Reason.NO_IMAGE, f"image {number} has no id and file_name")
            continue
        image: bytes | Fault | None = None
        if "image" in columns or settings.hashes_images:
            image = finder.read_image(name, settings.document_bytes)
        if "image" in columns:
            # An image is checked once, however many captions it has.
            image = check_image(image, settings)
        if "text" not in columns:
            yield picture_document(file.path, number, name, image, None, columns)
            continue
        image_annotations = by_image.get(entry["id"])
        if not image_annotations:
            yield BadLine(file.path, number, Reason.NO_TEXT, f"{name}: the image has no caption")
        for annotation in image_annotations or ():
            yield picture_document(file.path, annotation.number, name, image, annotation.caption, columns)


def _is_id(value: object) -> bool:
    return isinstance(value, int | str)


def _parse_coco(content: bytes) -> tuple[list[Any], list[Any]]:
    """Return the lists `images` and `annotations` of a JSON file.

    Raises:
        DamageError: it is not JSON, or it has no captions.
    """
    try:
        tree = orjson.loads(content)
    except ValueError as e:
        raise DamageError(f"it is not JSON: {e}") from e
    images, annotations = (tree.get(key) if isinstance(tree, dict) else None for key in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise DamageError("it has no lists 'images' and 'annotations'")
    if annotations and not any(isinstance(entry, dict) and "caption" in entry for entry in annotations):
        raise DamageError("its annotations have no captions: name the files of captions by a pattern")
    return images, annotations


class _ImageFinder:
    """Finder of the images that a JSON file names.

    Args:
        storage: the storage that holds the file.
        path: the path of the JSON file.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage = storage
        folder, _, file_name = path.rpartition("/")
        parent = folder.rpartition("/")[0]
        split = file_name.partition(".")[0].rpartition("_")[2]
        roots = [folder, parent] if parent and not parent.endswith(("/", ":")) else [folder]
        self._folders = [f"{root}/" if root else "" for root in roots]
        self._folders += [f"{root}{split}/" for root in self._folders]

    def read_image(self, name: str, limit: int) -> bytes | Fault:
        """Return the content of an image, or the reason why it cannot be read; `limit` is its largest size in bytes."""
        # A name from somebody else's file must not lead outside of the data set.
        if name.startswith("/") or ".." in name.split("/"):
            return Fault(Reason.NO_IMAGE, "its name is no path below a folder")
        for folder in self._folders:
            try:
                content = self._storage.read_bytes(folder + name, limit)
            except FileNotFoundError:
                continue
            except OSError as e:
                return Fault(Reason.NO_IMAGE, short_message(e))
            # All images of a file are usually in one folder, so that folder is tried first for the next one.
            self._folders.remove(folder)
            self._folders.insert(0, folder)
            return Fault(Reason.TOO_LONG) if content is None else content
        return Fault(Reason.NO_IMAGE, f"no such file in {' or '.join(self._folders)}")
