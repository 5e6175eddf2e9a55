from collections import Counter
from itertools import pairwise
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.inspect.figures import bin_of, octaves, quantile
from tests.data.inspect.surveys import histogram

LENGTHS = st.lists(st.one_of(st.integers(0, 100), st.integers(0, 1 << 40)), max_size=60)


@given(LENGTHS, LENGTHS)
def test_histograms_add_up(a, b):
    assert histogram(a) + histogram(b) == histogram(a + b)


@given(st.integers(0, 1 << 50))
def test_a_bin_is_narrow_and_begins_with_itself(length):
    lowest = bin_of(length)
    assert lowest <= length < lowest + max(1, lowest / 16)
    assert bin_of(lowest) == lowest


@given(LENGTHS)
def test_octaves_are_exact(lengths):
    found = octaves(histogram(lengths))
    expected = Counter(0 if not n else 2 ** (n.bit_length() - 1) for n in lengths)
    assert {o: n for o, n in found.items() if n} == expected
    powers = [o for o in found if o]
    assert powers == sorted(powers)
    assert all(b == 2 * a for a, b in pairwise(powers)), "no gaps"


@given(LENGTHS.filter(bool), st.floats(0.01, 1))
def test_quantiles_are_at_most_a_sixteenth_low(lengths, share):
    true = sorted(lengths)[ceil(share * len(lengths)) - 1]
    assert true * 15 / 16 <= quantile(histogram(lengths), share) <= true


def test_nothing():
    assert quantile({}, 0.5) == 0
    assert octaves({}) == {}
