"""Tests of the codebook of an encoder: normalized patches and their clusters."""

import numpy as np
import torch

from mhmoe_ray.data.prepare.codebook import k_means, normalized_patches


def test_patches_are_normalized_row_by_row():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    pixels[:2, 2:] = 9
    patches = normalized_patches(pixels, 2)
    assert patches.shape == (6, 12)
    for number, patch in enumerate(patches):
        row, column = 2 * (number // 2), 2 * (number % 2)
        values = torch.tensor(pixels[row : row + 2, column : column + 2].reshape(-1)).float() / 255
        variance, mean = torch.var_mean(values)
        assert np.allclose(patch, (values - mean) / (variance + 1e-6).sqrt(), atol=1e-5)
    assert np.abs(patches[1]).max() < 1e-3


def test_centres_are_the_means_of_the_points_nearest_to_them():
    random = np.random.default_rng(1)
    means = random.normal(0, 10, (8, 5))
    points = np.concatenate([mean + random.normal(0, 0.5, (50, 5)) for mean in means]).astype(np.float32)
    centres = k_means(points, 12)
    nearest_centres = np.square(points[:, None] - centres).sum(axis=2).argmin(axis=1)
    # Ten iterations need not reach the fixed point for more points; for these they do.
    for number, centre in enumerate(centres):
        assert np.allclose(centre, points[nearest_centres == number].mean(axis=0), atol=1e-3)
    assert np.array_equal(k_means(points, 12), centres)


def test_k_means_has_an_entry_for_each_of_few_points():
    points = np.array([[0, 0], [0, 0], [0, 0], [5, 5], [9, 0]], np.float32)
    assert {tuple(centre) for centre in k_means(points, 4)} == {(0, 0), (5, 5), (9, 0)}
