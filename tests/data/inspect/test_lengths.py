from collections import Counter
from itertools import pairwise
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.inspect.figures import histogram_bin, octave_counts, quantile
from tests.data.inspect.surveys import make_histogram

LENGTHS = st.lists(st.one_of(st.integers(0, 100), st.integers(0, 1 << 40)), max_size=60)


@given(LENGTHS, LENGTHS)
def test_histograms_of_parts_add_up(a, b):
    assert make_histogram(a) + make_histogram(b) == make_histogram(a + b)


@given(st.integers(0, 1 << 50))
def test_histogram_bin_is_narrow(length):
    bin_start = histogram_bin(length)
    assert bin_start <= length < bin_start + max(1, bin_start / 16)
    assert histogram_bin(bin_start) == bin_start


@given(LENGTHS)
def test_octave_counts_are_exact(lengths):
    counts = octave_counts(make_histogram(lengths))
    expected = Counter(0 if not n else 2 ** (n.bit_length() - 1) for n in lengths)
    assert {o: n for o, n in counts.items() if n} == expected
    powers = [o for o in counts if o]
    assert powers == sorted(powers)
    assert all(b == 2 * a for a, b in pairwise(powers)), "there is a gap"


@given(LENGTHS.filter(bool), st.floats(0.01, 1))
def test_quantile_is_at_most_a_sixteenth_too_low(lengths, share):
    exact_quantile = sorted(lengths)[ceil(share * len(lengths)) - 1]
    assert exact_quantile * 15 / 16 <= quantile(make_histogram(lengths), share) <= exact_quantile


def test_quantile_and_octave_counts_of_no_lengths():
    assert quantile({}, 0.5) == 0
    assert octave_counts({}) == {}
