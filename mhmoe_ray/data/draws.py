"""Random draws from a seed and a label, equal on every machine and in every process."""

import hashlib
from decimal import Context, Decimal
from functools import cache

import numpy as np


def seeded_hash(seed: int, label: str) -> int:
    """Return a 64-bit hash of a seed and a label, from 0 to 2^64 - 1; it is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{label}".encode(), digest_size=8).digest(), "little")


RATIOS = 1024
"""Number of different ratios that `Draws.ratio` draws from."""


@cache
def _ratios(smallest: Decimal) -> list[float]:
    """Return `RATIOS` ratios from `smallest` to its inverse, at equal distances of their logarithms."""
    # The last bit of the C library's exponential function differs between machines, and that of decimals does not.
    context = Context(prec=28)
    exponents = (Decimal(2 * number + 1) / RATIOS - 1 for number in range(RATIOS))
    return [float(context.power(smallest, exponent)) for exponent in exponents]


class Draws:
    """Random draws from a seed and a label. They depend on raw bits only, which do not change between versions."""

    def __init__(self, seed: int, label: str) -> None:
        self._bits = np.random.Philox(key=seeded_hash(seed, label))
        self._numbers: list[float] = []

    def uniform(self, count: int) -> np.ndarray:
        """Return `count` numbers from 0 to below 1, float64."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def number(self) -> float:
        """Return one number from 0 to below 1."""
        # A call for many numbers takes about as long as one for a single number.
        if not self._numbers:
            self._numbers = self.uniform(16).tolist()
        return self._numbers.pop()

    def between(self, low: float, high: float) -> float:
        """Return a number from `low` to below `high`."""
        return low + (high - low) * self.number()

    def integer(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        return low + int((high - low + 1) * self.number())

    def ratio(self, smallest: Decimal) -> float:
        """Return a ratio between `smallest`, which is below 1, and its inverse. Its logarithm is uniform."""
        return _ratios(smallest)[int(len(_ratios(smallest)) * self.number())]

    def choose(self, candidates: np.ndarray, count: int) -> np.ndarray:
        """Return `count` different elements of `candidates`, in their order."""
        # A stable sort makes equal draws, of which there are hardly any, the same on every machine.
        return candidates[np.sort(np.argsort(self.uniform(len(candidates)), kind="stable")[:count])]
