from itertools import permutations
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.order.order import MAX_PLACE, Permutations, seeded
from tests.data.order.plain_order import mixed, permuted

KEYS = st.integers(0, 2**64 - 1)


@settings(max_examples=100)
@given(size=st.integers(1, 300), key=KEYS, epoch=st.integers(0, 10**9))
def test_an_epoch_is_a_permutation_and_that_of_the_plain_loop(size, key, epoch):
    place = np.arange(size)
    found = Permutations([size], [key])(np.zeros(size, np.int64), epoch * size + place)
    assert sorted(found) == list(range(size))
    epoch_key = mixed(key + epoch * 0x9E3779B97F4A7C15)
    assert found.tolist() == [permuted(i, size, epoch_key) for i in range(size)]


@settings(max_examples=40)
@given(size=st.integers(1, MAX_PLACE), key=KEYS, nth=st.integers(0, MAX_PLACE - 100))
def test_domains_of_any_size(size, key, nth):
    found = Permutations([3, size], [0, key])(np.ones(100, np.int64), nth + np.arange(100))
    assert found.min() >= 0
    assert found.max() < size
    epoch = (nth + np.arange(100)) // size
    assert len(set(zip(epoch, found, strict=True))) == 100, "nothing twice in an epoch"


def chi_square(counts: np.ndarray, expected: float | np.ndarray) -> float:
    """Return the chi-square statistic as standard deviations from its mean by chance."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / sqrt(2 * freedom))


def epochs(size: int, count: int, key: str) -> np.ndarray:
    """Return the permutations of `count` epochs, with shape (count, size)."""
    place = np.arange(count * size)
    return Permutations([size], [seeded(1, key)])(np.zeros(len(place), np.int64), place).reshape(count, size)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_a_few_samples_are_as_likely(size):
    orders = list(permutations(range(size)))
    found = epochs(size, 500 * len(orders), "few")
    counts = np.array([(found == order).all(1).sum() for order in orders])
    assert abs(chi_square(counts, 500)) < 5


@pytest.mark.parametrize("size", [10, 30, 100])
def test_pairs_of_samples_and_places_are_as_likely(size):
    found = epochs(size, 2000, "pairs")
    of_place = np.zeros((size, size))
    np.add.at(of_place, (np.arange(size), found), 1)
    assert abs(chi_square(of_place, 2000 / size)) < 5
    following = np.zeros((size, size))
    np.add.at(following, (found[:, :-1], found[:, 1:]), 1)
    assert following.diagonal().sum() == 0
    assert abs(chi_square(following[~np.eye(size, dtype=bool)], 2000 / size)) < 5
    steps = np.bincount(((found[:, 1:] - found[:, :-1]) % size).ravel(), minlength=size)[1:]
    assert abs(chi_square(steps, 2000)) < 5


def test_orders_of_epochs_keys_and_storage_are_unrelated():
    size = 20_000
    first, second = epochs(size, 2, "a")
    other = epochs(size, 1, "b")[0]
    for a, b in [(first, second), (first, other), (first, np.arange(size)), (first[1:], first[:-1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / sqrt(size)
