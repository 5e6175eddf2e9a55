"""Nearest neighbours of images in pixels: the baseline of what a model recognizes in pictures.

An image is shrunk to 16 x 16 pixels, and each value is standardized over the images of the training. The distance of
two images is the Euclidean one.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mhmoe_ray.data.crops import read_crop
from mhmoe_ray.data.shards.manifest import DataManifest, data_digest, read_data_manifest
from mhmoe_ray.spec import RunSpec

SIZE = 16
"""Height and width of the images that are compared, in pixels."""
BLOCK_IMAGES = 256
"""Number of images whose distances are computed at a time."""


def training_manifest(spec: RunSpec, data_sha256: str | None, print_line: Callable[[str], None]) -> DataManifest | None:
    """Return the manifest of the data that a run was trained on; None if it is gone, or was replaced by other data.

    Args:
        spec: spec of the run.
        data_sha256: hash of the data in the run's checkpoint.
        print_line: a function that prints a line.
    """
    manifest = read_data_manifest(spec.data.prepared)
    if manifest is None or data_digest(spec.data.prepared) != data_sha256:
        print_line(f"no nearest neighbours: the training's data is not in {spec.data.prepared}")
        return None
    return manifest


class NearestImages:
    """Distances of images to the images of a training."""

    def __init__(self, training_images: Iterable[bytes]) -> None:
        """Decode the images of the training; an image that occurs several times is decoded once.

        Args:
            training_images: the image file of each sample, at least one.
        """
        images, self._image_of = distinct_images(training_images)
        pixel_NV = _pixels(images)
        self._mean_V = pixel_NV.mean(0)
        # A pixel that is the same in all images says nothing.
        self._scale_V = 1 / np.maximum(pixel_NV.std(0), 1e-6)
        self._training_NV = self._standardize(pixel_NV)

    def _standardize(self, pixel_NV: np.ndarray) -> np.ndarray:
        standardized_NV: np.ndarray = (pixel_NV - self._mean_V) * self._scale_V
        return standardized_NV

    def scores(self, images: Sequence[bytes], labels: np.ndarray, label_count: int) -> np.ndarray:
        """Return the score of each label for each image, (images, labels) float32: minus the squared distance to the
        nearest training image with that label, and minus infinity for a label without one.

        Args:
            images: image files.
            labels: label of each sample of the training; a label below 0 is none.
            label_count: number of labels, which are numbered from 0.
        """
        is_labelled = labels >= 0
        # Each pair of an image and a label counts once, in the order of the labels.
        pairs = np.unique(np.stack([labels[is_labelled], self._image_of[is_labelled]], 1), axis=0)
        scores = np.full((len(images), label_count), -np.inf, np.float32)
        if not len(pairs):
            return scores
        present_labels, first_pairs = np.unique(pairs[:, 0], return_index=True)
        for start, score_BN in self._blocks(images):
            best_BL = np.maximum.reduceat(score_BN[:, pairs[:, 1]], first_pairs, axis=1)
            scores[start : start + BLOCK_IMAGES, present_labels] = best_BL
        return scores

    def nearest_samples(self, images: Sequence[bytes]) -> list[int]:
        """Return the number of the first sample of the training with the nearest image, for each image."""
        first_samples = np.unique(self._image_of, return_index=True)[1]
        nearest_numbers = np.concatenate([score_BN.argmax(1) for _, score_BN in self._blocks(images)])
        return [int(sample) for sample in first_samples[nearest_numbers]]

    def _blocks(self, images: Sequence[bytes]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of the first image of each block, and minus the squared distances of its images to those of
        the training, (images, training images)."""
        training_norm_N = np.square(self._training_NV).sum(1)
        for start in range(0, len(images), BLOCK_IMAGES):
            query_BV = self._standardize(_pixels(images[start : start + BLOCK_IMAGES]))
            norm_B1 = np.square(query_BV).sum(1, keepdims=True)
            yield start, 2 * query_BV @ self._training_NV.T - norm_B1 - training_norm_N


def distinct_images(images: Iterable[bytes]) -> tuple[list[bytes], np.ndarray]:
    """Return the different images in the order of their first occurrence, and for each image the number of its own."""
    numbers, distinct, image_of = dict[bytes, int](), list[bytes](), list[int]()
    for image in images:
        number = numbers.setdefault(hashlib.blake2b(image, digest_size=16).digest(), len(numbers))
        if number == len(distinct):
            distinct.append(image)
        image_of.append(number)
    return distinct, np.array(image_of, np.int64)


def _pixels(images: Sequence[bytes]) -> np.ndarray:
    """Return the values of the pixels of images, from 0 to 1, (images, values) float32."""
    return np.stack([read_crop(image, SIZE).ravel() for image in images]).astype(np.float32) / 255
