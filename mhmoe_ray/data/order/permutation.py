"""Shuffled samples within a domain: any element of any keyed permutation of 0..n-1, in constant time and memory.

The permutation is a Feistel network over a rectangle of a x b cells, with a and b close to the square root of n; the
rounds add modulo a and b in turn. A value on one of the fewer than a + b cells outside 0..n-1 goes through it again.
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np

U32 = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
U64 = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
I64 = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

MAX_POSITION = 2**52
"""Upper bound of slots and positions, below which float64 quotients of integers never round up to the next integer."""

# This is the number of pairs of Feistel rounds. With only 4 pairs, the possible orders of fewer than 20 samples are
# visibly not equally likely.
ROUND_PAIRS = 6


class Permutations:
    """Endless shuffled sequences of samples, one for each domain; each sample occurs once in every epoch.

    `sizes` are from 1 to `MAX_POSITION`; `keys` have 64 bits.
    """

    def __init__(self, sizes: Sequence[int], keys: Sequence[int]) -> None:
        assert all(1 <= size <= MAX_POSITION for size in sizes)
        # The samples are the cells of a rectangle. If it is nearly square, it has few more cells than samples, so few
        # values must go through the Feistel network again.
        columns = [isqrt(size - 1) + 1 for size in sizes]
        self._sizes = np.asarray(sizes, np.int64)
        self._keys = np.asarray(keys, np.uint64)
        self._columns = np.asarray(columns, np.int64)
        self._rows = np.asarray([-(-size // c) for size, c in zip(sizes, columns, strict=True)], np.int64)

    def __call__(self, domain: I64, slot: I64) -> I64:
        """Return the sample in each slot of a domain's sequence, elementwise; slots are counted over all epochs."""
        sizes, rows, columns = self._sizes.take(domain), self._rows.take(domain), self._columns.take(domain)
        # Below MAX_POSITION the float division, which is fast, gives the exact whole quotient.
        epoch = (slot / sizes).astype(np.int64)
        # The constant is the increment of splitmix64.
        keys = _mix_bits(self._keys.take(domain) + epoch.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        value = _feistel_network(slot - epoch * sizes, rows, columns, keys)
        # Cells outside of the permutation go through the network again until they fall inside (cycle walking).
        outside = np.flatnonzero(value >= sizes)
        while len(outside):
            outside_values, outside_rows, outside_columns = (x.take(outside) for x in (value, rows, columns))
            value[outside] = next_values = _feistel_network(
                outside_values, outside_rows, outside_columns, keys.take(outside)
            )
            outside = outside[next_values >= sizes.take(outside)]
        return value


def _feistel_network(value: I64, rows: I64, columns: I64, key: U64) -> I64:
    """Permute cells, numbered row * columns + column."""
    row = (value / columns).astype(np.int64)
    column = (value - row * columns).astype(np.uint32)
    left_half, right_half = row.astype(np.uint32), column
    height, width = rows.astype(np.uint32), columns.astype(np.uint32)
    low, step = key.astype(np.uint32), (key >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    for _ in range(ROUND_PAIRS):
        left_half = _feistel_round(left_half, right_half, low, height)
        low += step
        right_half = _feistel_round(right_half, left_half, low, width)
        low += step
    return left_half * columns + right_half


def _feistel_round(target_half: U32, source_half: U32, key: U32, modulus: U32) -> U32:
    """Return target_half + f(source_half, key) modulo `modulus`; f mixes bits and scales the result below `modulus`."""
    # The constants are those of MurmurHash3's finaliser.
    x = source_half + key
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0xC2B2AE35)
    scaled = x.astype(np.uint64)
    scaled *= modulus
    scaled >>= np.uint64(32)
    total = scaled.astype(np.uint32)
    total += target_half
    # This computes the total modulo `modulus`. If the total is below the modulus, the difference wraps round to a large
    # number, so that the minimum is the total.
    reduced = total - modulus
    np.minimum(total, reduced, out=total)
    return total


def _mix_bits(x: U64) -> U64:
    """Mix bits with the finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
