"""Tests of the masks of masked pre-training."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.draws import Draws
from mhmoe_ray.families.encoder.data.masking import block_mask, masked_count, text_mask


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_block_mask_hides_exactly_its_share(rows, columns, share, seed):
    mask = block_mask(rows, columns, share, seed, "images:5")
    assert mask.shape == (rows, columns)
    assert mask.sum() == int(share * rows * columns + 0.5)


def neighbour_share(mask):
    """Return the share of pairs of neighbouring patches that are both hidden or both visible."""
    return np.mean([*(mask[1:] == mask[:-1]).flat, *(mask[:, 1:] == mask[:, :-1]).flat])


def test_blocks_are_larger_than_single_patches():
    """A mask of single patches would hide or show both patches of 0.4^2 + 0.6^2 = 0.52 of the pairs of neighbours."""
    masks = [block_mask(14, 14, 0.4, seed, "x") for seed in range(200)]
    assert np.mean([neighbour_share(mask) for mask in masks]) > 0.75
    shares = np.mean(masks, axis=0)
    # Few blocks reach the corners, but every patch is hidden in some images.
    assert shares.min() > 0.01
    assert shares.mean() == pytest.approx(78 / 196)


@given(tokens=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_text_mask_hides_at_least_one_token_and_not_all_of_several(tokens, share, seed):
    mask = text_mask(tokens, share, seed, "texts:7")
    assert mask.sum() == masked_count(tokens, share) == max(1, min(int(tokens * share + 0.5), tokens - 1))


def test_every_token_is_hidden_equally_often():
    counts = sum(text_mask(20, 0.15, 3, f"texts:{position}") for position in range(4000))
    assert counts / 4000 == pytest.approx(np.full(20, 0.15), abs=0.025)


def test_masks_depend_on_seed_and_label_only():
    """The digest of the masks is equal on all machines, because only raw bits and float64 arithmetic decide them."""
    masks = [block_mask(14, 14, 0.4, seed, f"images:{position}") for seed in (0, 1) for position in range(20)]
    masks += [text_mask(64, 0.15, seed, f"texts:{position}") for seed in (0, 1) for position in range(20)]
    digests = {mask.tobytes() for mask in masks}
    assert len(digests) == len(masks)
    digest = hashlib.blake2b(b"".join(mask.tobytes() for mask in masks), digest_size=8).hexdigest()
    assert digest == "88a815ad0329e130"


def test_draws_are_uniform_and_inclusive():
    draws = Draws(7, "x")
    numbers = [draws.integer(2, 5) for _ in range(4000)]
    assert np.bincount(numbers, minlength=6)[2:] / 4000 == pytest.approx([0.25] * 4, abs=0.03)
    values = draws.uniform(10_000)
    assert 0 <= values.min() < values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    chosen_numbers = draws.choose(np.arange(100), 10)
    assert (np.diff(chosen_numbers) > 0).all()
