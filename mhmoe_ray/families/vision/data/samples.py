"""Samples of a vision model: decoded images with their classes or their objects, task by task.

Images to classify are cropped. Images with objects are cropped in training; in evaluation they are scaled to fit, and
filled up with grey to a square. A random crop depends only on the seed, the task and the position in the training.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhmoe_ray.data.images.annotations import Annotation, Instance, decode_mask, unpack
from mhmoe_ray.data.images.files import decode_image
from mhmoe_ray.data.order.rows import RowOrder, held_out_numbers
from mhmoe_ray.data.shards.manifest import CLASSES_FILE, DataManifest, read_classes
from mhmoe_ray.data.shards.rows import ANNOTATION, IMAGE, RowReader, StoredValues
from mhmoe_ray.families.images.crops import Crop, centre_crop, crop_pixels, random_crop
from mhmoe_ray.families.vision.data.columns import ImageObjects, TaskSamples, VisionSamples
from mhmoe_ray.families.vision.data.fit import Fit, fit_pixels
from mhmoe_ray.spec import MicroBatchPart, RunSpec

if TYPE_CHECKING:
    from PIL import Image

MIN_VISIBLE_SHARE = 0.3
"""Smallest share of the area of an object's box that a crop must contain; otherwise the object is left out."""
MIN_SIDE = 2
"""Smallest height and width of an object, in pixels of the image that the model reads; smaller ones are left out."""


class TaskSampleMaker:
    """Maker of one task's samples from stored images; `class_names` are in the order of the classes' numbers."""

    def __init__(self, spec: RunSpec, part: MicroBatchPart, class_names: Sequence[str]) -> None:
        assert spec.model.vision is not None
        self._spec, self._part, self._task = spec, part, spec.model.vision.tasks[part.name]
        self._numbers = {name: number for number, name in enumerate(class_names)}

    def make(self, images: Sequence[bytes], annotations: Sequence[bytes], labels: Sequence[str] | None) -> TaskSamples:
        """Return samples of the task from encoded images and stored annotations.

        With the seed of the run, a sample's label determines its random crop; `labels` is None in evaluation.
        """
        size, unpacked = self._task.image_size, [unpack(content) for content in annotations]
        choosers = [self._crop_function(label) for label in labels] if labels is not None else [None] * len(images)
        decoded = (decode_image(content) for content in images)
        if self._task.detector is None:
            pixels = [
                crop_pixels(image, size, choose_crop or centre_crop)
                for image, choose_crop in zip(decoded, choosers, strict=True)
            ]
            classes = [self._numbers[a.class_name] for a in unpacked if a.class_name is not None]
            return TaskSamples(_stack(pixels, size), np.array(classes, np.int64))
        samples = [
            self._read_objects(image, annotation, choose_crop)
            for image, annotation, choose_crop in zip(decoded, unpacked, choosers, strict=True)
        ]
        return TaskSamples(_stack([pixels for pixels, _ in samples], size), None, [objects for _, objects in samples])

    def _crop_function(self, label: str) -> Callable[[int, int], Crop]:
        return partial(random_crop, images=self._spec.data.images, seed=self._spec.seed, label=f"{label} crop")

    def _read_objects(
        self, image: "Image.Image", annotation: Annotation, choose_crop: Callable[[int, int], Crop] | None
    ) -> tuple[np.ndarray, ImageObjects]:
        """Return an image as the model reads it, with its objects that remain visible after the crop."""
        from PIL import Image

        size, (width, height) = self._task.image_size, image.size
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
                classes.append(self._numbers[instance.class_name])
                masks += [mask] if self._part.has_masks and mask is not None else []
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


def task_makers(spec: RunSpec, classes: Mapping[str, Sequence[str]]) -> dict[str, TaskSampleMaker]:
    """Return the maker of each task's samples, by the name of the task; `classes` has each task's class names."""
    return {part.name: TaskSampleMaker(spec, part, classes[part.name]) for part in spec.parts}


class VisionTrainingSamples:
    """Random access to the samples of a vision model's training, by the number of the micro-batch."""

    def __init__(self, spec: RunSpec) -> None:
        self._order = RowOrder(spec)
        self._makers = task_makers(spec, read_classes(spec.data.prepared / CLASSES_FILE))

    @staticmethod
    def open_cached(spec: RunSpec) -> "VisionTrainingSamples":
        """Return the training samples of a spec, which a process caches for its next Ray tasks."""
        return _open_samples(spec.model_dump_json())

    def read(self, micro_batch: int) -> VisionSamples:
        """Return the samples of all tasks in a micro-batch."""
        samples = {}
        for part in self._order.parts(micro_batch):
            columns = {name: [b""] * len(part.positions) for name in (IMAGE, ANNOTATION)}
            for group in self._order.locate(part.positions):
                for name, values in columns.items():
                    for index, value in zip(group.indices, group.reader.read_values(name, group.numbers), strict=True):
                        values[index] = value
            samples[part.part.name] = self._makers[part.part.name].make(
                columns[IMAGE], columns[ANNOTATION], part.labels
            )
        return samples


# The argument is JSON, since a cache needs hashable arguments and a spec is not hashable.
@lru_cache(maxsize=2)
def _open_samples(spec_json: str) -> VisionTrainingSamples:
    return VisionTrainingSamples(RunSpec.model_validate_json(spec_json))


class AnnotatedImages(NamedTuple):
    """Images and annotations of one task, encoded as shards store them."""

    images: Sequence[bytes]
    annotations: Sequence[bytes]


class StoredSamples:
    """Samples of one task as evaluation reads them, without random crops; they are decoded on access."""

    def __init__(self, maker: TaskSampleMaker, stored: AnnotatedImages) -> None:
        self._maker, self._stored = maker, stored

    @property
    def sample_count(self) -> int:
        """The number of stored samples of the task."""
        return len(self._stored.images)

    def rows(self, start: int, stop: int) -> TaskSamples:
        """Return samples `start` to `stop` - 1 of the task, decoded."""
        return self._maker.make(self._stored.images[start:stop], self._stored.annotations[start:stop], None)


def held_out_images(spec: RunSpec, manifest: DataManifest) -> dict[str, AnnotatedImages]:
    """Return the held-out images of each task that has any, by the name of the task; they are read on access."""
    reader = RowReader(spec.data.prepared, manifest.validation, manifest.token_bytes)
    return {
        name: AnnotatedImages(StoredValues(reader, IMAGE, rows), StoredValues(reader, ANNOTATION, rows))
        for name, rows in held_out_numbers(spec, manifest).items()
    }


def vision_validation_samples(spec: RunSpec, manifest: DataManifest) -> Mapping[str, StoredSamples]:
    """Return the held-out samples of each task that has any, by the name of the task, as evaluation reads them."""
    makers = task_makers(spec, read_classes(spec.data.prepared / CLASSES_FILE))
    return {name: StoredSamples(makers[name], stored) for name, stored in held_out_images(spec, manifest).items()}
