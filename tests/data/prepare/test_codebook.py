"""Tests of the codebook of an encoder: normalized patches and their clusters."""

import numpy as np
import torch

from mhmoe_ray.data.shards.columns import IMAGE, TOKENS
from mhmoe_ray.data.shards.files import to_batch, write_shard
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.families.encoder.data.batches import BatchMaker
from mhmoe_ray.families.encoder.data.codebook import k_means, sample_patches
from mhmoe_ray.families.encoder.data.samples import SampleMaker
from tests.support.encoders import encoder_spec
from tests.support.images import make_images


def test_patches_of_the_sample_are_the_targets_of_training(tmp_path):
    """The sample has all patches of all images, since there are few."""
    images = make_images(5)
    spec = encoder_spec()
    tokens = np.zeros((5, 12), np.uint16)
    shard = write_shard(tmp_path, "a.arrow", to_batch({TOKENS: tokens, IMAGE: [picture.image for picture in images]}))
    patches = sample_patches(ShardReader(tmp_path, [shard], 2), spec.model.encoder)
    part = next(part for part in spec.parts if part.name == "images")._replace(samples=5)
    samples = SampleMaker(spec, 2).make(part, {TOKENS: tokens, IMAGE: [p.image for p in images]}, [""] * 5, crops=False)
    samples = samples._replace(patch_hidden=np.ones_like(samples.patch_hidden))
    targets = BatchMaker(spec.model, torch.device("cpu")).make([part], samples).patch_target_I
    assert patches.shape == (5 * 16, 48)
    torch.testing.assert_close(torch.from_numpy(patches), targets, rtol=1e-5, atol=1e-5)


def test_centres_are_the_means_of_the_points_nearest_to_them():
    random = np.random.default_rng(1)
    means = random.normal(0, 10, (8, 5))
    points = np.concatenate([mean + random.normal(0, 0.5, (50, 5)) for mean in means]).astype(np.float32)
    centres = k_means(points, 12)
    nearest_centres = np.square(points[:, None] - centres).sum(axis=2).argmin(axis=1)
    # The ten iterations reach the fixed point of k-means for these points, but not for every set of points.
    for number, centre in enumerate(centres):
        assert np.allclose(centre, points[nearest_centres == number].mean(axis=0), atol=1e-3)
    assert np.array_equal(k_means(points, 12), centres)


def test_k_means_has_an_entry_for_each_of_few_points():
    points = np.array([[0, 0], [0, 0], [0, 0], [5, 5], [9, 0]], np.float32)
    assert {tuple(centre) for centre in k_means(points, 4)} == {(0, 0), (5, 5), (9, 0)}
