"""Nearest training images in pixels: the baseline of retrieval, captions and classes of images.

An image is shrunk to 16 x 16 pixels, and each of its values is standardized over the training images. The distance of
two images is the Euclidean one.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.shards.cache import plan_cache
from mhmoe_ray.data.shards.columns import IMAGE
from mhmoe_ray.data.shards.manifest import DataManifest, data_digest, read_data_manifest
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.families.images.crops import read_crop
from mhmoe_ray.spec import RunSpec

SIZE = 16
"""Height and width in pixels to which images are shrunk before they are compared."""
BLOCK_IMAGES = 256
"""Number of images whose distances are computed at a time."""
MAX_IMAGES = 20_000
"""Largest number of training images that are compared, evenly spaced, because each of them must be decoded."""
BLOCK_SCORES = 1 << 24
"""Approximate number of scores, each of an image and a labelled training image, that are in memory at a time."""


def training_manifest(spec: RunSpec, data_sha256: str | None, print_line: Callable[[str], None]) -> DataManifest | None:
    """Return the manifest of a run's training data; None, with a printed line, if it is gone or was replaced."""
    manifest = read_data_manifest(spec.data.prepared)
    if manifest is None or data_digest(spec.data.prepared) != data_sha256:
        print_line(f"no nearest neighbours: the training's data is not in {spec.data.prepared}")
        return None
    return manifest


def training_reader(spec: RunSpec, manifest: DataManifest, sources: Collection[str]) -> ShardReader:
    """Return a reader of the training samples of some sources, domain after domain."""
    domains = (domain for name, domain in manifest.domains.items() if source_of(name) in sources)
    shards = [shard for domain in domains for shard in domain.shards]
    plan = plan_cache(spec.data.prepared, manifest, spec.cluster.shard_cache)
    return ShardReader(spec.data.prepared, shards, manifest.token_bytes, plan)


class NearestImages:
    """Search for the nearest training images to other images, among `image_count` different ones."""

    def __init__(self, training_images: Iterable[bytes], image_of: np.ndarray | None = None) -> None:
        """Decode each different training image once; there must be at least one.

        `image_of` has the number of each sample's image, below 0 if it is not compared; by default each sample has the
        image at its own position.
        """
        # Only the shrunken image is kept, since all image files together may be larger than the memory.
        numbers, pixels, number_of = dict[bytes, int](), list[np.ndarray](), list[int]()
        for image in training_images:
            number = numbers.setdefault(_digest(image), len(numbers))
            if number == len(pixels):
                pixels.append(read_crop(image, SIZE).ravel())
            number_of.append(number)
        self.image_count = len(pixels)
        self._image_of = np.array(number_of, np.int64)
        if image_of is not None:
            self._image_of = np.where(image_of < 0, -1, self._image_of[image_of])
        pixel_NV = _values(pixels)
        self._mean_V = pixel_NV.mean(0)
        # A pixel that is the same in all images has deviation 0, so the lower bound avoids a division by 0.
        self._scale_V = 1 / np.maximum(pixel_NV.std(0), 1e-6)
        self._training_NV = self._standardize(pixel_NV)

    @staticmethod
    def of_training(reader: ShardReader) -> "NearestImages":
        """Create the search among at most `MAX_IMAGES` images of the samples."""
        image_of_sample = reader.image_numbers()
        first_samples = np.sort(np.unique(image_of_sample, return_index=True)[1])
        # The selected images are spread evenly from the first to the last. Their rounded numbers differ, because
        # `count` is at most the number of images.
        count = min(MAX_IMAGES, len(first_samples))
        samples = first_samples[np.linspace(0, len(first_samples) - 1, count).round().astype(np.int64)]
        number_of_image = np.full(image_of_sample.max() + 1, -1)
        number_of_image[image_of_sample[samples]] = np.arange(count)
        images = (reader.read_values(IMAGE, sample)[0] for sample in np.split(samples, len(samples)))
        return NearestImages(images, number_of_image[image_of_sample])

    def _standardize(self, pixel_NV: np.ndarray) -> np.ndarray:
        standardized_NV: np.ndarray = (pixel_NV - self._mean_V) * self._scale_V
        return standardized_NV

    def scores(self, images: Sequence[bytes], labels: np.ndarray, label_count: int) -> np.ndarray:
        """Return the score of each label for each image, (images, labels) float32.

        The score is minus the squared distance to the nearest training image with that label, or minus infinity if
        there is none. `labels` has a label for each training sample, below 0 if it has none.
        """
        is_labelled = (labels >= 0) & (self._image_of >= 0)
        # Each pair of an image and a label counts once, in the order of the labels.
        pairs = np.unique(np.stack([labels[is_labelled], self._image_of[is_labelled]], 1), axis=0)
        scores = np.full((len(images), label_count), -np.inf, np.float32)
        if not len(pairs):
            return scores
        present_labels, first_pairs = np.unique(pairs[:, 0], return_index=True)
        rows = max(1, BLOCK_SCORES // len(pairs))
        for start, score_BN in self._blocks(images):
            for row in range(0, len(score_BN), rows):
                score_BP = score_BN[row : row + rows, pairs[:, 1]]
                best_BL = np.maximum.reduceat(score_BP, first_pairs, axis=1)
                scores[start + row : start + row + len(score_BP), present_labels] = best_BL
        return scores

    def nearest_samples(self, images: Sequence[bytes]) -> list[int]:
        """Return for each image the number of the first training sample that has the nearest image."""
        compared_samples = np.flatnonzero(self._image_of >= 0)
        first_samples = compared_samples[np.unique(self._image_of[compared_samples], return_index=True)[1]]
        nearest_numbers = np.concatenate([score_BN.argmax(1) for _, score_BN in self._blocks(images)])
        return [int(sample) for sample in first_samples[nearest_numbers]]

    def _blocks(self, images: Sequence[bytes]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of each block's first image, and minus the squared distances, (images, training images)."""
        training_norm_N = np.square(self._training_NV).sum(1)
        for start in range(0, len(images), BLOCK_IMAGES):
            pixels = [read_crop(image, SIZE).ravel() for image in images[start : start + BLOCK_IMAGES]]
            query_BV = self._standardize(_values(pixels))
            norm_B1 = np.square(query_BV).sum(1, keepdims=True)
            yield start, 2 * query_BV @ self._training_NV.T - norm_B1 - training_norm_N


def distinct_images(images: Iterable[bytes]) -> tuple[list[bytes], np.ndarray]:
    """Return the different images, in the order of first occurrence, and the number of each image among these."""
    numbers, distinct, image_of = dict[bytes, int](), list[bytes](), list[int]()
    for image in images:
        number = numbers.setdefault(_digest(image), len(numbers))
        if number == len(distinct):
            distinct.append(image)
        image_of.append(number)
    return distinct, np.array(image_of, np.int64)


def _digest(image: bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest()


def _values(pixels: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(pixels).astype(np.float32) / 255
