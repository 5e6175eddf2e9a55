"""Random numbers that a seed and a label determine, on every machine and in every process."""

import hashlib
from decimal import Context, Decimal
from functools import cache

import numpy as np


def seeded_hash(seed: int, label: str) -> int:
    """Return a 64-bit hash of a seed and a label."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{label}".encode(), digest_size=8).digest(), "little")


RATIOS = 1024
"""Number of different ratios that `Draws.ratio` draws from."""


@cache
def _ratios(smallest: Decimal) -> list[float]:
    """Return `RATIOS` ratios from `smallest` to its inverse, evenly spaced on a logarithmic scale."""
    # Decimal arithmetic gives the same result on every machine. The C library's exponential function may differ in the
    # last bit.
    context = Context(prec=28)
    exponents = (Decimal(2 * number + 1) / RATIOS - 1 for number in range(RATIOS))
    return [float(context.power(smallest, exponent)) for exponent in exponents]


class Draws:
    """Generator of random numbers from Philox's raw bits, which do not change between versions of NumPy."""

    def __init__(self, seed: int, label: str) -> None:
        self._bits = np.random.Philox(key=seeded_hash(seed, label))
        self._numbers: list[float] = []

    def uniform(self, count: int) -> np.ndarray:
        """Return `count` float64 numbers, uniform in [0, 1)."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def number(self) -> float:
        """Return one number, uniform in [0, 1)."""
        # A call for sixteen numbers takes about as long as a call for one, so the other numbers are kept for the next
        # calls.
        if not self._numbers:
            self._numbers = self.uniform(16).tolist()
        return self._numbers.pop()

    def between(self, low: float, high: float) -> float:
        """Return a number, uniform from `low` to below `high`."""
        return low + (high - low) * self.number()

    def integer(self, low: int, high: int) -> int:
        """Return a random integer from `low` to `high`, both included."""
        return low + int((high - low + 1) * self.number())

    def ratio(self, smallest: Decimal) -> float:
        """Return a log-uniform ratio between `smallest`, which is below 1, and `1 / smallest`."""
        return _ratios(smallest)[int(len(_ratios(smallest)) * self.number())]

    def choose(self, candidates: np.ndarray, count: int) -> np.ndarray:
        """Return `count` different random elements of `candidates`, in their order."""
        # Two drawn numbers are hardly ever equal. If they are, a stable sort orders them in the same way on every
        # machine.
        return candidates[np.sort(np.argsort(self.uniform(len(candidates)), kind="stable")[:count])]
