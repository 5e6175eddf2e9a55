"""Samples of a vision model: decoded images with their classes or their objects, task by task.

Images to classify are cropped. Images with objects are cropped in training; in evaluation they are scaled to fit, and
filled up with grey to a square. A random crop depends only on the seed, the task and the position in the training.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mhmoe_ray.data.family import PartSampleMaker
from mhmoe_ray.data.images.annotations import Annotation, Instance, decode_mask, unpack
from mhmoe_ray.data.images.files import decode_image
from mhmoe_ray.data.shards.columns import ANNOTATION, IMAGE, StoredColumns
from mhmoe_ray.families.images.crops import Crop, centre_crop, crop_pixels, random_crop
from mhmoe_ray.families.vision.data.columns import ImageObjects, TaskSamples
from mhmoe_ray.families.vision.data.fit import Fit, fit_pixels
from mhmoe_ray.spec import MicroBatchPart, RunSpec

if TYPE_CHECKING:
    from PIL import Image

MIN_VISIBLE_SHARE = 0.3
"""Smallest share of the area of an object's box that a crop must contain; otherwise the object is left out."""
MIN_SIDE = 2
"""Smallest height and width of an object, in pixels of the image that the model reads; smaller ones are left out."""


class TaskSampleMaker(PartSampleMaker):
    """Maker of samples from stored images; `classes` has each task's class names in the order of their numbers."""

    columns = (IMAGE, ANNOTATION)

    def __init__(self, spec: RunSpec, classes: Mapping[str, Sequence[str]]) -> None:
        assert spec.model.vision is not None
        self._spec, self._tasks = spec, spec.model.vision.tasks
        self._numbers = {
            task: {name: number for number, name in enumerate(class_names)} for task, class_names in classes.items()
        }

    def make(self, part: MicroBatchPart, stored: StoredColumns, labels: Sequence[str], *, crops: bool) -> TaskSamples:
        """Return samples of the task of a part; a label determines the random crop."""
        task, size = self._tasks[part.name], self._tasks[part.name].image_size
        annotations = [unpack(content) for content in stored[ANNOTATION]]
        choosers = [self._crop_function(label) if crops else None for label in labels]
        decoded = (decode_image(content) for content in stored[IMAGE])
        if task.detector is None:
            pixels = [
                crop_pixels(image, size, choose_crop or centre_crop)
                for image, choose_crop in zip(decoded, choosers, strict=True)
            ]
            classes = [self._numbers[part.name][a.class_name] for a in annotations if a.class_name is not None]
            return TaskSamples(_stack(pixels, size), np.array(classes, np.int64))
        samples = [
            self._read_objects(part, image, annotation, choose_crop)
            for image, annotation, choose_crop in zip(decoded, annotations, choosers, strict=True)
        ]
        return TaskSamples(_stack([pixels for pixels, _ in samples], size), None, [objects for _, objects in samples])

    def _crop_function(self, label: str) -> Callable[[int, int], Crop]:
        return partial(random_crop, images=self._spec.data.images, seed=self._spec.seed, label=f"{label} crop")

    def _read_objects(
        self,
        part: MicroBatchPart,
        image: "Image.Image",
        annotation: Annotation,
        choose_crop: Callable[[int, int], Crop] | None,
    ) -> tuple[np.ndarray, ImageObjects]:
        """Return an image as the model reads it, with its objects that remain visible after the crop."""
        from PIL import Image

        size, (width, height) = self._tasks[part.name].image_size, image.size
        if choose_crop is None:
            crop, target_size = Crop((0, 0, width, height)), Fit.of_image(width, height, size)[1:]
            pixels = fit_pixels(image, size)
        else:
            crop, target_size = choose_crop(width, height), (size, size)
            pixels = crop_pixels(image, size, lambda *_: crop)
        boxes, classes, masks = list[np.ndarray](), list[int](), list[np.ndarray]()
        for instance in annotation.instances:
            if instance.is_crowd:
                continue
            mask = None
            if instance.mask is not None:
                full_mask = decode_mask(instance.mask, width, height)
                scaled = Image.fromarray(full_mask.astype(np.uint8) * 255).resize(
                    target_size, Image.Resampling.BILINEAR, box=crop.box
                )
                mask = np.zeros((size, size), bool)
                mask[: target_size[1], : target_size[0]] = np.asarray(scaled) >= 128
                mask = mask[:, ::-1] if crop.is_mirrored else mask
            box = _visible_box(instance, mask, crop, target_size, size)
            if box is not None:
                boxes.append(box)
                classes.append(self._numbers[part.name][instance.class_name])
                masks += [mask] if part.has_masks and mask is not None else []
        return pixels, ImageObjects(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(classes, np.int64),
            np.stack(masks) if masks else np.zeros((0, size, size), bool),
        )


def _stack(pixels: Sequence[np.ndarray], size: int) -> np.ndarray:
    return np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)


def _visible_box(
    instance: Instance, mask: np.ndarray | None, crop: Crop, target_size: tuple[int, int], size: int
) -> np.ndarray | None:
    """Return the edges of an object in the pixels that the model reads, or None if too little of it is visible.

    `mask` and `target_size`, the crop's width and height, are in these pixels. `size` is the side of the square.
    """
    left_edge, top_edge, right_edge, bottom_edge = crop.box
    crop_width, crop_height = right_edge - left_edge, bottom_edge - top_edge
    scale = np.array([target_size[0] / crop_width, target_size[1] / crop_height] * 2)
    full_box = (np.array(instance.box) - [left_edge, top_edge, left_edge, top_edge]) * scale
    box = np.clip(full_box, 0, [*target_size, *target_size])
    if crop.is_mirrored:
        box = np.array([size - box[2], box[1], size - box[0], box[3]])
    full_area = float(np.prod(full_box[2:] - full_box[:2]))
    if np.prod(np.maximum(0, box[2:] - box[:2])) < MIN_VISIBLE_SHARE * full_area:
        return None
    if mask is not None:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return None
        box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return box if min(box[2:] - box[:2]) >= MIN_SIDE else None
