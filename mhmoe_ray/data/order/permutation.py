"""Keyed permutations of 0..n-1, elementwise: any place of any permutation in constant time and memory.

A Feistel network over a rectangle of a x b cells, a and b next to the root of n, that adds modulo a and b in turn. Of
its cells fewer than a + b lie outside 0..n-1; a value that lands there is sent round again.
"""

import hashlib
from collections.abc import Sequence
from math import isqrt

import numpy as np

U32 = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
U64 = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
I64 = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

MAX_PLACE = 2**52
"""Quotients of smaller numbers, rounded to float64, never reach the next whole number."""

ROUND_PAIRS = 6  # with 4, orders of fewer than 20 samples are visibly not all as likely


def seeded(seed: int, what: str) -> int:
    """A number of 64 bits that depends on its arguments alone, on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{what}".encode(), digest_size=8).digest(), "little")


class Permutations:
    """An endless sequence for each domain, epoch by epoch: within an epoch each sample comes once."""

    def __init__(self, sizes: Sequence[int], keys: Sequence[int]) -> None:
        """Args:
        sizes: samples of each domain, from 1 to `MAX_PLACE`.
        keys: 64 bits for each domain.
        """
        assert all(1 <= size <= MAX_PLACE for size in sizes)
        columns = [isqrt(size - 1) + 1 for size in sizes]
        self._size = np.asarray(sizes, np.int64)
        self._key = np.asarray(keys, np.uint64)
        self._columns = np.asarray(columns, np.int64)
        self._rows = np.asarray([-(-size // c) for size, c in zip(sizes, columns, strict=True)], np.int64)

    def __call__(self, domain: I64, nth: I64) -> I64:
        """The sample at place `nth` (from 0, below `MAX_PLACE`) of a domain's sequence, elementwise."""
        size, rows, columns = self._size.take(domain), self._rows.take(domain), self._columns.take(domain)
        epoch = (nth / size).astype(np.int64)
        key = _mix(self._key.take(domain) + epoch.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        value = _network(nth - epoch * size, rows, columns, key)
        outside = np.flatnonzero(value >= size)
        while len(outside):
            at_last, own_rows, own_columns = (x.take(outside) for x in (value, rows, columns))
            value[outside] = moved = _network(at_last, own_rows, own_columns, key.take(outside))
            outside = outside[moved >= size.take(outside)]
        return value


def _network(value: I64, rows: I64, columns: I64, key: U64) -> I64:
    """From cell to cell; a cell's number is row * columns + column."""
    row = (value / columns).astype(np.int64)
    column = (value - row * columns).astype(np.uint32)
    x, y = row.astype(np.uint32), column
    height, width = rows.astype(np.uint32), columns.astype(np.uint32)
    low, step = key.astype(np.uint32), (key >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    for _ in range(ROUND_PAIRS):
        x = _added(x, y, low, height)
        low += step
        y = _added(y, x, low, width)
        low += step
    return x * columns + y


def _added(half: U32, other: U32, key: U32, modulus: U32) -> U32:
    """half + f(other, key) modulo `modulus`; f is a finaliser with two multiplications, scaled to below `modulus`."""
    x = other + key
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0xC2B2AE35)
    scaled = x.astype(np.uint64)
    scaled *= modulus
    scaled >>= np.uint64(32)
    total = scaled.astype(np.uint32)
    total += half
    less = total - modulus  # wraps round to a large number where nothing is to be taken off
    np.minimum(total, less, out=total)
    return total


def _mix(x: U64) -> U64:
    """splitmix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
