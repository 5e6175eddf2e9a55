"""Annotations of images for vision models, and their storage as JSON.

An annotation is the class of an image, or its objects with boxes, classes and masks. Classes are stored by name. The
number of a class is its index among the sorted names of all classes in the training samples of a task.
"""

import importlib.util
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import orjson

from mhmoe_ray.data.images.files import require_pillow
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import SourceSpec


class Instance(NamedTuple):
    """Annotated object in an image: its class, its box and perhaps its mask."""

    class_name: str
    box: tuple[float, float, float, float]
    """Left, top, right and bottom edge in pixels."""
    mask: str | None
    """Mask in the size of the image as COCO's compressed run lengths (`counts`); None if the object has only a box."""
    is_crowd: bool = False
    """True if the mask covers a group of objects. Training leaves such a group out, and evaluation ignores it."""


class Annotation(NamedTuple):
    """Annotation of an image in its source: the class of the image, or its objects."""

    class_name: str | None = None
    """Class of the image; None if its source has objects."""
    instances: tuple[Instance, ...] = ()
    image_id: int | str | None = None
    """Id of the image in its source; None if the source has classes of images."""

    @property
    def class_names(self) -> set[str]:
        """The names of all classes in this annotation."""
        return {i.class_name for i in self.instances} if self.class_name is None else {self.class_name}


def require_image_packages(sources: Iterable[SourceSpec]) -> None:
    """Check that the packages for reading the images and objects of these sources are installed.

    Raises:
        DataError: a package is missing.
    """
    columns = {column for source in sources for column in source.sample_columns}
    if "image" in columns:
        require_pillow()
    if "objects" in columns and importlib.util.find_spec("pycocotools") is None:
        fix = "pip install 'mhmoe-ray[vision]'"
        raise DataError("sources with objects", "the package pycocotools is missing", fix)


def pack(annotation: Annotation) -> bytes:
    """Return an annotation as the JSON that shards store."""
    if annotation.class_name is not None:
        return orjson.dumps({"class": annotation.class_name})
    return orjson.dumps({"image_id": annotation.image_id, "objects": [i._asdict() for i in annotation.instances]})


def unpack(content: bytes) -> Annotation:
    """Return the annotation in the JSON that `pack` made."""
    tree = orjson.loads(content)
    if "class" in tree:
        return Annotation(tree["class"])
    instances = (Instance(**{**fields, "box": tuple(fields["box"])}) for fields in tree["objects"])
    return Annotation(None, tuple(instances), tree["image_id"])


def decode_mask(counts: str, width: int, height: int) -> np.ndarray:
    """Return a mask as an array, bool (height, width), from COCO's compressed run lengths."""
    from pycocotools import mask as coco_masks

    mask: np.ndarray = coco_masks.decode({"size": [height, width], "counts": counts.encode()}).astype(bool)
    return mask
