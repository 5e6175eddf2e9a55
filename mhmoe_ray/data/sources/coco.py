"""Reader of COCO's JSON files: captions of images, or images with objects.

A file has `images`, a list of {id, file_name}, and `annotations`. In a file of captions, an annotation is {image_id,
caption}, and a document is one caption with its image, or one image if the source uses only images.

In a file of instances, an annotation is {id, image_id, category_id, bbox, segmentation, iscrowd}, and `categories` is a
list of {id, name}. A document is an image with all its objects, even if it has none. An object that cannot be used is
quarantined by its id, and its image stays. The size of an image is read from the image file, because `width` and
`height` in the JSON may be wrong.

An image is looked for by its `file_name` in four folders: that of the JSON file, its parent, and the subfolder of each
that is named like the split, the last word of the JSON file's name: `train2017` for `captions_train2017.json`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from mhmoe_ray.data.images.annotations import Annotation, Instance, pack
from mhmoe_ray.data.sources.compression import decompress_at_once
from mhmoe_ray.data.sources.images import check_image, decode_checked_image, image_document
from mhmoe_ray.data.sources.items import BadLine, DamageError, Document, Fault, RawFile, ReadSettings, Reason, Tally
from mhmoe_ray.data.sources.masks import ObjectError, encode_mask, is_number
from mhmoe_ray.data.sources.records import json_type, text_problem
from mhmoe_ray.data.sources.storage import Storage, leaves_folder
from mhmoe_ray.spec import SourceSpec
from mhmoe_ray.spec.formats import Column
from mhmoe_ray.storage import short_message

MAX_ID_CHARACTERS = 100


class _CocoFile(NamedTuple):
    """Parsed content of one of COCO's JSON files."""

    images: list[Any]
    annotations: list[Any]
    class_names: dict[int | str, str]
    """Names of the categories by id; empty if the source reads no objects."""


class _ImageAnnotation(NamedTuple):
    """Entry of the list `annotations`, with its number in the file from 1."""

    number: int
    fields: dict[str, Any]


def read_coco(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the documents of one of COCO's JSON files, image by image.

    `Document.line` is the number of the annotation for a caption, and of the image for all other documents.
    """
    columns = source.sample_columns
    try:
        # The bytes are not counted here but in the loop over the images below, because the images take most of the
        # time.
        content = decompress_at_once(storage.chunks(file, Tally()), file.path, file.size)
        coco = _parse_coco(content, columns)
    except DamageError as damage:
        yield BadLine(file.path, 1, Reason.PART_LOST, damage.reason)
        return
    del content
    split = file.path.rpartition("/")[2].partition(".")[0].rpartition("_")[2]
    finder, read_ids = ImageFinder(storage, file.path, [f"{split}/"]), set[int | str]()
    by_image: dict[Any, list[_ImageAnnotation]] = defaultdict(list)
    known_ids = {entry.get("id") for entry in coco.images if isinstance(entry, dict) and _is_id(entry.get("id"))}
    for number, entry in enumerate(coco.annotations if columns != ("image",) else (), start=1):
        image_id: Any = entry.get("image_id") if isinstance(entry, dict) else None
        if not _is_id(image_id) or image_id not in known_ids:
            yield BadLine(file.path, number, Reason.NO_IMAGE, f"image_id {_id_text(image_id)} is not among its images")
        else:
            by_image[image_id].append(_ImageAnnotation(number, entry))
    for number, entry in enumerate(coco.images, start=1):
        tally.bytes_read = file.size * number // len(coco.images)
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _is_id(entry.get("id")):
            yield BadLine(file.path, number, Reason.NO_IMAGE, f"image {number} has no id and file_name")
            continue
        # An image with the id of an earlier one is refused, because nothing tells to which of the two images the
        # annotations of this id belong.
        if columns != ("image",) and entry["id"] in read_ids:
            detail = f"{name}: its id {_id_text(entry['id'])} is that of an earlier image"
            yield BadLine(file.path, number, Reason.NO_IMAGE, detail)
            continue
        read_ids.add(entry["id"])
        image: bytes | Fault | None = None
        if "image" in columns or settings.hashes_images:
            image = finder.read_image(name, settings.document_bytes)
        annotations = by_image.get(entry["id"], [])
        if "objects" in columns:
            yield from _read_objects(file.path, number, entry, image, annotations, coco.class_names, columns, settings)
            continue
        if "image" in columns:
            # An image is checked once, however many captions it has.
            image = check_image(image, settings)
        if "text" not in columns:
            yield image_document(file.path, number, name, image, None, columns)
            continue
        if not annotations:
            yield BadLine(file.path, number, Reason.NO_TEXT, f"{name}: the image has no caption")
        for annotation in annotations:
            caption = annotation.fields.get("caption")
            if not isinstance(caption, str):
                caption = Fault(Reason.NO_TEXT, f"its caption is {json_type(caption)}")
            yield image_document(file.path, annotation.number, name, image, caption, columns)


def _is_id(value: object) -> bool:
    return isinstance(value, int | str)


def _id_text(value: object) -> str:
    """Return an id, any JSON value, for an error message: lists and objects by type, since they may nest too deeply."""
    is_printable = value is None or isinstance(value, int | float | str)
    return repr(value)[:MAX_ID_CHARACTERS] if is_printable else json_type(value)


def _parse_coco(content: bytes, columns: Sequence[Column]) -> _CocoFile:
    """Parse one of COCO's JSON files; without JSON or the lists that the columns need, raise DamageError."""
    try:
        tree = orjson.loads(content)
    except ValueError as e:
        raise DamageError(f"it is not JSON: {e}") from e
    images, annotations = (tree.get(key) if isinstance(tree, dict) else None for key in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise DamageError("it has no lists 'images' and 'annotations'")
    has_objects = "objects" in columns
    key = "bbox" if has_objects else "caption"
    if annotations and not any(isinstance(entry, dict) and key in entry for entry in annotations):
        if has_objects:
            raise DamageError("its annotations have no objects: name the files of instances by a pattern")
        raise DamageError("its annotations have no captions: name the files of captions by a pattern")
    if not has_objects:
        return _CocoFile(images, annotations, {})
    categories = tree.get("categories")
    if annotations and not isinstance(categories, list):
        raise DamageError("it has no list 'categories'")
    class_names = {
        category["id"]: category["name"]
        for category in (categories if isinstance(categories, list) else ())
        if isinstance(category, dict) and _is_id(category.get("id")) and _is_class_name(category.get("name"))
    }
    return _CocoFile(images, annotations, class_names)


def _is_class_name(name: object) -> bool:
    return isinstance(name, str) and text_problem(name) is None


def _read_objects(
    path: str,
    number: int,
    entry: dict[str, Any],
    image: bytes | Fault | None,
    annotations: list[_ImageAnnotation],
    class_names: dict[int | str, str],
    columns: Sequence[Column],
    settings: ReadSettings,
) -> Iterator[Document | BadLine]:
    """Yield a `BadLine` for each unusable object of an image, then the image with its other objects as a document."""
    decoded_image = decode_checked_image(image, settings)
    if isinstance(decoded_image, Fault):
        yield image_document(path, number, entry["file_name"], decoded_image, None, columns)
        return
    instances = []
    for annotation in annotations:
        try:
            instances.append(_checked_instance(annotation.fields, class_names, *decoded_image.size))
        except ObjectError as e:
            detail = f"annotation {_id_text(annotation.fields.get('id'))}: {e}"
            yield BadLine(path, annotation.number, Reason.BAD_OBJECT, detail)
    content = pack(Annotation(image_id=entry["id"], instances=tuple(instances)))
    yield image_document(path, number, entry["file_name"], image, None, columns, annotation=content)


def _checked_instance(fields: dict[str, Any], class_names: dict[int | str, str], width: int, height: int) -> Instance:
    """Return the object of an annotation, its box cut off at the edges of the image, or raise ObjectError."""
    category_id = fields.get("category_id")
    if not _is_id(category_id) or category_id not in class_names:
        raise ObjectError(f"category_id {_id_text(category_id)} is not among the categories with a name")
    is_crowd = fields.get("iscrowd")
    if is_crowd not in (None, 0, 1):
        raise ObjectError("its iscrowd is neither 0 nor 1")
    box = _checked_box(fields.get("bbox"), width, height)
    segmentation = fields.get("segmentation")
    # Labelling programs that know only boxes write an empty list in place of a mask.
    mask = None if segmentation is None or segmentation == [] else encode_mask(segmentation, width, height)
    return Instance(class_names[category_id], box, mask, bool(is_crowd))


def _checked_box(bbox: object, width: int, height: int) -> tuple[float, float, float, float]:
    """Return the left, top, right and bottom of COCO's box [x, y, width, height] in the image, or raise ObjectError."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_number, bbox)):
        raise ObjectError("its bbox is no list of four numbers")
    x, y, box_width, box_height = map(float, bbox)
    if not all(map(math.isfinite, (x, y, box_width, box_height))):
        raise ObjectError("its bbox has a number that is not finite")
    if box_width <= 0 or box_height <= 0:
        raise ObjectError("its bbox has no area")
    x_min, x_max = max(x, 0.0), min(x + box_width, float(width))
    y_min, y_max = max(y, 0.0), min(y + box_height, float(height))
    if x_min >= x_max or y_min >= y_max:
        raise ObjectError("its bbox is outside of the image")
    return x_min, y_min, x_max, y_max


class ImageFinder:
    """Finder of the image files that a JSON file names: in its folder, in the parent, and in subfolders of both."""

    def __init__(self, storage: Storage, path: str, subfolders: Sequence[str]) -> None:
        self._storage = storage
        folder = path.rpartition("/")[0]
        parent = folder.rpartition("/")[0]
        roots = [folder, parent] if parent and not parent.endswith(("/", ":")) else [folder]
        self._folders = [f"{root}/" if root else "" for root in roots]
        self._folders += [f"{root}{subfolder}" for subfolder in subfolders for root in self._folders]

    def read_image(self, name: str, limit: int) -> bytes | Fault:
        """Return an image file, or the reason why it cannot be read; reading stops after `limit` bytes."""
        if leaves_folder(name):
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
