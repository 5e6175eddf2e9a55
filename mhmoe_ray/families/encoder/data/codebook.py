"""The codebook of an encoder: the centres of a k-means clustering of normalized patches of training images.

About `SAMPLE_BYTES` bytes of patches from at most `MAX_IMAGES` images are clustered. The seed of the sample is fixed,
so the same images give the same sample. An image is cropped to the largest square at its centre.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mhmoe_ray.data.shards.columns import IMAGE
from mhmoe_ray.data.shards.manifest import CODEBOOK_FILE, Shard
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.families.encoder.data.batches import normalized_patches
from mhmoe_ray.families.images.crops import read_crop
from mhmoe_ray.families.images.patches import image_patches
from mhmoe_ray.spec.encoder import EncoderSpec
from mhmoe_ray.storage import Location, replace_file

SAMPLE_BYTES = 128 << 20
MAX_IMAGES = 20_000
ITERATIONS = 10
_DISTANCE_BYTES = 64 << 20
_SEED = 0


def write_codebook(
    folder: Location, shards: Mapping[str, Sequence[Shard]], encoder: EncoderSpec, token_bytes: int
) -> str:
    """Write the codebook to the staging directory as float32 (entries, values), and return its SHA-256: a Ray task.

    The images of `shards` must have at least as many patches as the codebook has entries.
    """
    reader = ShardReader(folder, [shard for name in sorted(shards) for shard in shards[name]], token_bytes)
    codebook = k_means(sample_patches(reader, encoder), encoder.codebook_size)
    sink = io.BytesIO()
    np.save(sink, codebook)
    replace_file(folder / CODEBOOK_FILE, sink.getvalue())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def sample_patches(reader: ShardReader, encoder: EncoderSpec) -> np.ndarray:
    """Return a random sample of normalized patches of training images, (patches, values) float32."""
    random = np.random.default_rng(_SEED)
    image_count = min(len(reader), MAX_IMAGES)
    patch_count = max(encoder.codebook_size, SAMPLE_BYTES // (4 * encoder.patch_values))
    per_image = min(encoder.patches, -(-patch_count // image_count))
    numbers = np.sort(random.choice(len(reader), image_count, replace=False))
    patches = np.empty((image_count, per_image, encoder.patch_values), np.float32)
    for index, number in enumerate(numbers):
        [image] = reader.read_values(IMAGE, np.array([number]))
        patch_numbers = np.sort(random.choice(encoder.patches, per_image, replace=False))
        pixels = read_crop(image, encoder.image_size)
        image_NYXC = torch.from_numpy(np.array(pixels))[None]
        patches[index] = normalized_patches(image_patches(image_NYXC, encoder.patch_size)[0])[patch_numbers].numpy()
    return patches.reshape(-1, encoder.patch_values)


def k_means(points: np.ndarray, entries: int) -> np.ndarray:
    """Cluster points, (points, values), by Lloyd's algorithm, and return the centres, (entries, values), all float32.

    A centre that is nearest to no point moves to the point that is farthest from its own centre. There must be at least
    as many points as entries.
    """
    random = np.random.default_rng(_SEED)
    centres: np.ndarray = points[np.sort(random.choice(len(points), entries, replace=False))]
    previous_centres = np.full(len(points), -1)
    for _ in range(ITERATIONS):
        nearest_centres, distances = _nearest_centres(points, centres)
        if np.array_equal(nearest_centres, previous_centres):
            break
        previous_centres = nearest_centres
        counts = np.bincount(nearest_centres, minlength=entries)
        filled = np.flatnonzero(counts)
        starts = np.cumsum(counts)[filled] - counts[filled]
        sums = np.add.reduceat(points[np.argsort(nearest_centres, kind="stable")], starts)
        centres[filled] = sums / counts[filled, None]
        empty = np.flatnonzero(counts == 0)
        centres[empty] = points[np.argsort(-distances, kind="stable")[: len(empty)]]
    return centres


def _nearest_centres(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the nearest centre of each point, and the square of its distance."""
    nearest_centres, distances = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    centre_squares = np.square(centres).sum(axis=1)
    rows = max(1, _DISTANCE_BYTES // (4 * len(centres)))
    for start in range(0, len(points), rows):
        stretch = points[start : start + rows]
        # The score of a centre c for a point p is |p - c|^2 without |p|^2, which is the same for all centres.
        scores = centre_squares - 2 * stretch @ centres.T
        nearest_centres[start : start + rows] = scores.argmin(axis=1)
        smallest = np.take_along_axis(scores, nearest_centres[start : start + rows, None], axis=1)[:, 0]
        distances[start : start + rows] = smallest + np.square(stretch).sum(axis=1)
    return nearest_centres, distances
