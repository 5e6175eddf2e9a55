"""The order of training samples: a pure function of (seed, position), whoever asks and whenever.

A position is the number of a sample in the whole training, from 0. Step s of M micro-batches of b sequences reads
positions s*M*b .. (s+1)*M*b - 1, micro-batch by micro-batch.

Which domain: a deck of `DECK` slots, dealt again and again. A domain's slots lie evenly spread over the deck, so its
share is right at every prefix to within two samples, up to the rounding of shares to 1/DECK.
Which of its samples: the n-th slot of a domain takes sample permutation(n mod size) of epoch n // size; the permutation
is a keyed Feistel network over the domain's size, so any place of any epoch is found in constant time and memory.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

DECK = 16_384
_ROUND_KEYS = [np.uint64(r * 0xD1B54A32D192ED03 % 2**64) for r in range(1, 9)]

U64 = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
I64 = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Order:
    def __init__(self, seed: int, samples: Sequence[int], shares: Sequence[float]) -> None:
        """Args:
        seed: another seed, another order.
        samples: number of samples of each domain, each at least 1.
        shares: positive weights of the domains; only their ratios count.
        """
        assert len(samples) == len(shares) >= 1
        assert min(samples) >= 1
        self._seed = seed
        self._samples = np.asarray(samples, np.int64)
        self._counts = _apportion(np.asarray(shares, float), DECK)
        keys = [(np.arange(c) + _unit(seed, i)) / c for i, c in enumerate(self._counts)]
        domain = np.repeat(np.arange(len(samples)), self._counts)
        place = np.argsort(np.concatenate(keys), kind="stable")
        self._deck: I64 = domain[place]
        rank = np.concatenate([np.arange(c) for c in self._counts])
        self._rank: I64 = rank[place]

    def __call__(self, position: I64) -> tuple[I64, I64]:
        """Positions to (domain, sample of that domain), elementwise."""
        deal, slot = np.divmod(position, DECK)
        domain = self._deck[slot]
        nth = deal * self._counts[domain] + self._rank[slot]
        epoch, index = np.divmod(nth, self._samples[domain])
        return domain, _permute(index, self._samples[domain], _mix(epoch, domain, self._seed))


def _apportion(shares: np.ndarray, slots: int) -> I64:
    """Whole slots in proportion to shares (largest remainders), at least one each."""
    exact = shares / shares.sum() * slots
    counts: I64 = np.maximum(np.floor(exact), 1).astype(np.int64)
    remainder = exact - counts
    for _ in range(slots - int(counts.sum())):
        i = int(remainder.argmax())
        counts[i] += 1
        remainder[i] -= 1
    while counts.sum() > slots:  # many domains that were owed less than one slot
        counts[counts.argmax()] -= 1
    return counts


def _unit(seed: int, domain: int) -> float:
    """A number in (0, 1) that shifts a domain's slots, so that domains of equal share alternate in a seeded order."""
    digest = hashlib.blake2b(f"{seed}:{domain}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") + 0.5) / 2**64


def _hash(x: U64) -> U64:
    """splitmix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix(epoch: I64, domain: I64, seed: int) -> U64:
    key = _hash(np.full_like(epoch, seed).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    key = _hash(key ^ domain.astype(np.uint64))
    return _hash(key + epoch.astype(np.uint64))


def _permute(index: I64, size: I64, key: U64) -> I64:
    """A keyed permutation of 0..size-1, elementwise: a Feistel network over the next power of four, walked until the
    value falls inside (under four rounds of it on average)."""
    half = ((np.ceil(np.log2(np.maximum(size, 2))).astype(np.int64) + 1) // 2).astype(np.uint64)
    value = _feistel(index.astype(np.uint64), half, key)
    outside = value >= size.astype(np.uint64)
    while outside.any():
        value[outside] = _feistel(value[outside], half[outside], key[outside])
        outside = value >= size.astype(np.uint64)
    return value.astype(np.int64)


def _feistel(value: U64, half: U64, key: U64) -> U64:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for round_key in _ROUND_KEYS:
        left, right = right, left ^ (_hash((right + key) ^ round_key) & mask)
    return (left << half) | right
