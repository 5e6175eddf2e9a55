from itertools import permutations
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.draws import seeded_hash
from mhmoe_ray.data.order.permutation import MAX_POSITION, Permutations
from tests.data.order.plain_order import mix_bits, permute_position

KEYS = st.integers(0, 2**64 - 1)


@settings(max_examples=100)
@given(size=st.integers(1, 300), key=KEYS, epoch=st.integers(0, 10**9))
def test_permutation_equals_the_plain_loop(size, key, epoch):
    positions = np.arange(size)
    permutation = Permutations([size], [key])(np.zeros(size, np.int64), epoch * size + positions)
    assert sorted(permutation) == list(range(size))
    epoch_key = mix_bits(key + epoch * 0x9E3779B97F4A7C15)
    assert permutation.tolist() == [permute_position(i, size, epoch_key) for i in range(size)]


@settings(max_examples=40)
@given(size=st.integers(1, MAX_POSITION), key=KEYS, start_position=st.integers(0, MAX_POSITION - 100))
def test_permutation_covers_domains_of_any_size(size, key, start_position):
    permutation = Permutations([3, size], [0, key])(np.ones(100, np.int64), start_position + np.arange(100))
    assert permutation.min() >= 0
    assert permutation.max() < size
    epoch = (start_position + np.arange(100)) // size
    assert len(set(zip(epoch, permutation, strict=True))) == 100, "a sample was repeated in an epoch"


def chi_square(counts: np.ndarray, expected: float | np.ndarray) -> float:
    """Return the distance of the chi-square statistic from its mean, in standard deviations."""
    degrees_of_freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees_of_freedom) / sqrt(2 * degrees_of_freedom))


def permutations_of_epochs(size: int, count: int, key: str) -> np.ndarray:
    """Return the permutations of the first `count` epochs of a domain of `size` samples, shape (count, size)."""
    positions = np.arange(count * size)
    return Permutations([size], [seeded_hash(1, key)])(np.zeros(len(positions), np.int64), positions).reshape(
        count, size
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_permutations_of_few_samples_are_equally_likely(size):
    orders = list(permutations(range(size)))
    permutation = permutations_of_epochs(size, 500 * len(orders), "few")
    counts = np.array([(permutation == order).all(1).sum() for order in orders])
    assert abs(chi_square(counts, 500)) < 5


@pytest.mark.parametrize("size", [10, 30, 100])
def test_permutations_place_and_order_samples_uniformly(size):
    permutation = permutations_of_epochs(size, 2000, "pairs")
    place_counts = np.zeros((size, size))
    np.add.at(place_counts, (np.arange(size), permutation), 1)
    assert abs(chi_square(place_counts, 2000 / size)) < 5
    successor_counts = np.zeros((size, size))
    np.add.at(successor_counts, (permutation[:, :-1], permutation[:, 1:]), 1)
    assert successor_counts.diagonal().sum() == 0
    assert abs(chi_square(successor_counts[~np.eye(size, dtype=bool)], 2000 / size)) < 5
    step_counts = np.bincount(((permutation[:, 1:] - permutation[:, :-1]) % size).ravel(), minlength=size)[1:]
    assert abs(chi_square(step_counts, 2000)) < 5


def test_permutations_of_epochs_and_keys_are_uncorrelated():
    size = 20_000
    first_permutation, second_permutation = permutations_of_epochs(size, 2, "a")
    other_permutation = permutations_of_epochs(size, 1, "b")[0]
    for a, b in [
        (first_permutation, second_permutation),
        (first_permutation, other_permutation),
        (first_permutation, np.arange(size)),
        (first_permutation[1:], first_permutation[:-1]),
    ]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / sqrt(size)
