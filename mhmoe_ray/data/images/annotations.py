"""Annotations of images, questions and sentences, and their storage as JSON.

A class is stored by name; its number is its index among the sorted class names in a task's training samples.
"""

import importlib.util
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import orjson

from mhmoe_ray.data.images.files import require_pillow
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import SourceSpec


class Instance(NamedTuple):
    """Annotated object in an image."""

    class_name: str
    box: tuple[float, float, float, float]
    """Left, top, right and bottom edge in pixels."""
    mask: str | None
    """COCO's compressed run lengths (`counts`) at the size of the image; None if the object has only a box."""
    is_crowd: bool = False
    """True if the mask covers a group of objects, which training leaves out and evaluation ignores."""


class Annotation(NamedTuple):
    """The class of an image, or its objects."""

    class_name: str | None = None
    """Class of the image, most frequent answer to the question, or "True" or "False" for a sentence; None if the source
    has objects."""
    instances: tuple[Instance, ...] = ()
    image_id: int | str | None = None
    """Id of the image, question or sentence in its source; None if the source has classes of images."""
    answers: tuple[str, ...] = ()
    """Answers of all annotators to the question; empty without a question."""

    @property
    def class_names(self) -> set[str]:
        """The names of all classes in this annotation."""
        return {i.class_name for i in self.instances} if self.class_name is None else {self.class_name}


def require_image_packages(sources: Iterable[SourceSpec]) -> None:
    """Raise DataError if a package for the images or objects of these sources is missing."""
    columns = {column for source in sources for column in source.sample_columns}
    if "image" in columns:
        require_pillow()
    if "objects" in columns and importlib.util.find_spec("pycocotools") is None:
        fix = "pip install 'mhmoe-ray[vision]'"
        raise DataError("sources with objects", "the package pycocotools is missing", fix)


def pack(annotation: Annotation) -> bytes:
    """Return an annotation as the JSON that shards store."""
    if annotation.class_name is not None:
        fields: dict[str, Any] = {"class": annotation.class_name}
        if annotation.image_id is not None:
            fields |= {"image_id": annotation.image_id, "answers": annotation.answers}
        return orjson.dumps(fields)
    return orjson.dumps({"image_id": annotation.image_id, "objects": [i._asdict() for i in annotation.instances]})


def unpack(content: bytes) -> Annotation:
    """Return the annotation in the JSON that `pack` made."""
    tree = orjson.loads(content)
    if "class" in tree:
        return Annotation(tree["class"], image_id=tree.get("image_id"), answers=tuple(tree.get("answers", ())))
    instances = (Instance(**{**fields, "box": tuple(fields["box"])}) for fields in tree["objects"])
    return Annotation(None, tuple(instances), tree["image_id"])


def decode_mask(counts: str, width: int, height: int) -> np.ndarray:
    """Decode COCO's compressed run lengths to a mask, bool (height, width)."""
    from pycocotools import mask as coco_masks

    mask: np.ndarray = coco_masks.decode({"size": [height, width], "counts": counts.encode()}).astype(bool)
    return mask
