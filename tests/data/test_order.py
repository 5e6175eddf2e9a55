import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.order import DECK, Order

mixtures = st.lists(st.tuples(st.integers(1, 300), st.floats(0.01, 1)), min_size=1, max_size=6)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), mixture=mixtures, start=st.integers(0, 10**12), length=st.integers(1, 500))
def test_any_stretch_is_the_same_however_it_is_asked_for(seed, mixture, start, length):
    order = Order(seed, *zip(*mixture, strict=True))
    position = np.arange(start, start + length)
    domain, sample = order(position)
    for p in (0, length // 2, length - 1):
        assert tuple(x[0] for x in order(position[p : p + 1])) == (domain[p], sample[p])
    shuffled = np.random.default_rng(0).permutation(length)
    assert np.array_equal(order(position[shuffled])[1], sample[shuffled])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), mixture=mixtures)
def test_each_epoch_of_a_domain_reads_each_sample_once(seed, mixture):
    order = Order(seed, *zip(*mixture, strict=True))
    domain, sample = order(np.arange(DECK))
    for d, (size, _) in enumerate(mixture):
        read = sample[domain == d]
        for epoch in range(len(read) // size):
            assert sorted(read[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), mixture=mixtures)
def test_shares_hold_at_every_prefix(seed, mixture):
    samples, shares = zip(*mixture, strict=True)
    domain, _ = Order(seed, samples, shares)(np.arange(2 * DECK))
    wanted = np.array(shares) / sum(shares)
    read = np.stack([np.cumsum(domain == d) for d in range(len(shares))], axis=1)
    owed = np.outer(np.arange(1, 2 * DECK + 1), wanted)
    rounding = 2  # a share is a whole number of a deck's slots, and two decks are dealt
    assert np.abs(read - owed).max() <= len(shares) + rounding


def test_epochs_and_seeds_differ_and_order_is_unrelated_to_storage():
    n = 1000
    first, second = (Order(7, [n], [1])(np.arange(start, start + n))[1] for start in (0, n))
    other = Order(8, [n], [1])(np.arange(n))[1]
    for a, b in [(first, second), (first, other), (first, np.arange(n)), (first[1:], first[:-1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


def test_order_never_changes():
    """Golden: a run that is resumed by a later version must read on where it stopped."""
    domain, sample = Order(3, [1000, 77, 5], [0.6, 0.3, 0.1])(np.arange(10**9, 10**9 + 8))
    assert (domain.tolist(), sample.tolist()) == GOLDEN


GOLDEN = ([1, 0, 0, 1, 2, 0, 0, 1], [52, 88, 845, 69, 2, 612, 639, 21])
