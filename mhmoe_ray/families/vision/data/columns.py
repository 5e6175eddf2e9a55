"""Samples of a vision model in memory, and as columns of the training stream. This module reads no prepared data."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.spec import MicroBatchPart


class ImageObjects(NamedTuple):
    """Objects of one image, in the pixels of the cropped or scaled image that the model reads."""

    boxes: np.ndarray
    """Left, top, right and bottom edges, (objects, 4) float32."""
    classes: np.ndarray
    """Number of the class of each object, (objects,) int64."""
    masks: np.ndarray
    """Mask of each object, (objects, size, size) bool, or (0, size, size) if the detector has no masks."""


class TaskSamples(NamedTuple):
    """Samples of one task of a vision model: images with their classes or their objects."""

    images: np.ndarray
    """Images, (samples, size, size, 3) uint8."""
    classes: np.ndarray | None = None
    """Number of the class of each image, (samples,) int64; None for detection."""
    objects: Sequence[ImageObjects] = ()
    """Objects of each image; empty for classification."""

    @property
    def sample_count(self) -> int:
        """The number of samples, each of which is one image."""
        return len(self.images)

    def rows(self, start: int, stop: int) -> "TaskSamples":
        """Return samples `start` to `stop` - 1 of the task."""
        classes = None if self.classes is None else self.classes[start:stop]
        return TaskSamples(self.images[start:stop], classes, self.objects[start:stop])

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield all arrays, from which training computes the digest of its data."""
        yield self.images
        if self.classes is not None:
            yield self.classes
        for image_objects in self.objects:
            yield from image_objects


VisionSamples = Mapping[str, TaskSamples]
"""Samples of a micro-batch of a vision model, by the name of the task."""


def stream_columns(micro_batches: Sequence[VisionSamples]) -> dict[str, np.ndarray]:
    """Return micro-batches as the columns of the training stream, which has a row for each micro-batch.

    Each task has a column of images, and one of their classes or of their objects, which are encoded as bytes.
    """
    columns = {}
    for name in micro_batches[0]:
        tasks = [micro_batch[name] for micro_batch in micro_batches]
        columns[f"{name} images"] = np.stack([task.images for task in tasks])
        if tasks[0].classes is not None:
            columns[f"{name} classes"] = np.stack([task.classes for task in tasks if task.classes is not None])
        else:
            columns[f"{name} objects"] = np.array([_pack_objects(task.objects) for task in tasks], object)
    return columns


def samples_in_row(row: Mapping[str, np.ndarray], parts: Sequence[MicroBatchPart]) -> VisionSamples:
    """Return the samples of a micro-batch from its row of the stream: the inverse of `stream_columns`."""
    # `np.array` copies the columns, because they may be in read-only memory, which a torch tensor must not share.
    samples = {}
    for part in parts:
        images = np.array(row[f"{part.name} images"][0])
        if part.objective == "classify":
            samples[part.name] = TaskSamples(images, np.array(row[f"{part.name} classes"][0]))
        else:
            objects = _unpack_objects(row[f"{part.name} objects"][0], images.shape[1])
            samples[part.name] = TaskSamples(images, None, objects)
    return samples


def _pack_objects(objects: Sequence[ImageObjects]) -> bytes:
    # Images have different numbers of objects, so their arrays have different shapes and cannot be rows of one column
    # of arrays. They are stored as bytes instead, their masks with 8 pixels in a byte.
    return pickle.dumps([o._replace(masks=np.packbits(o.masks, axis=2)) for o in objects])


def _unpack_objects(content: bytes, size: int) -> list[ImageObjects]:
    objects: list[ImageObjects] = pickle.loads(content)
    return [o._replace(masks=np.unpackbits(o.masks, axis=2, count=size).astype(bool)) for o in objects]
