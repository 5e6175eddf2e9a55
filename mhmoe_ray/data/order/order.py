"""The order of training samples: a pure function of (seed, position), the same for every process at every time.

A position is the number of a sample in the whole training, from 0. Step s of M micro-batches of b sequences reads
positions s*M*b .. (s+1)*M*b - 1, micro-batch by micro-batch.

| what                                  | depends on                                              | where          |
| ------------------------------------- | ------------------------------------------------------- | -------------- |
| the samples of a domain, and their    | its files' names and text, tokenizer, T, packing, which | data/prepare/  |
| numbers from 0                        | documents are held out                                  |                |
| weights of domains in each phase      | the spec's mixture, numbers of samples, steps * M * b   | mixture.py     |
| the domain at a position              | seed, weights of its phase                              | `Order`        |
| that domain's slot there, n           | how often it was dealt before, over all phases          | `Order`        |
| the sample of slot n                  | seed, name and size of the domain, n                    | `Permutations` |
| the rank that reads a position        | world, b: micro-batch m is rank m mod world's           | data/stream.py |

So the text of a step is the same at any number of workers.

The domain of a position: a phase of the training has whole-number weights and deals its positions to domains in
proportion to them, starting at a seeded slot of that sequence. At every prefix of the phase a source is within 3.36
samples of its share and a domain within 6.72; a phase whose length is the sum of its weights reads exactly its weights.
The sample within the domain: slot n of a domain, counted from 0 over all phases, belongs to epoch n // size and takes
element n mod size of that epoch's permutation. The permutation depends on seed, name and size of the domain only, so
another mixture reads the same domain in the same order.

Both are closed formulas: the cost of a position is a walk down a few levels of a tree, wherever the position lies.

Dealing slots to domains: `Interleaver` computes which domain any slot of an endless sequence goes to, in any
proportions, without computing the slots before it.

A binary tree has the domains as leaves. A node's c-th visitor (from 0) goes left if floor((c + 1) a / A) exceeds
floor(c a / A), where A is the node's weight and a its left child's. So floor(c a / A) of its first c visitors went
left. That is also the visitor's number at the left child; at the right child its number is c minus that. A walk from
the root gives a slot's domain and its number among that domain's slots. The sequence repeats after as many slots as the
root weighs, with exactly its weight for each domain.

Exactness: over any stretch of slots a child gets its part of its parent's visitors to within less than one. With
weights W_0 > W_1 > ... > W_m from the root to a leaf, n consecutive slots give that leaf n W_m / W_0 to within less
than the sum of W_m / W_k over k = 1..m. In a Huffman tree W_k >= W_(k+1) + W_(k+2), because the sibling of node k+1 is
no lighter than node k+2, which was merged first. So the W_k grow at least as fast as the Fibonacci numbers from the
leaf up, and the sum stays below their reciprocals' 1 + 1 + 1/2 + 1/3 + 1/5 + ... = 3.36, however many domains there are
and however small their shares. Sources are the leaves of one Huffman tree and the roots of others, so that they are as
exact as domains: over any stretch a source is within 3.36 slots of its part and a domain within 6.72.

A walk takes about as many levels as the mixture has bits of entropy, and at most about log_phi(1 / share).

Shuffling within a domain: `Permutations` computes any element of any keyed permutation of 0..n-1 in constant time and
memory.

It is a Feistel network over a rectangle of a x b cells, with a and b close to the square root of n; the rounds add
modulo a and b in turn. Fewer than a + b of its cells lie outside 0..n-1; a value that lands on one of them goes through
the network again.
"""

import hashlib
import heapq
from bisect import bisect_left
from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import numpy as np

U32 = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
U64 = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
I64 = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

MAX_PLACE = 2**52
"""Bound below which quotients of whole numbers, rounded to float64, never reach the next whole number."""

ROUND_PAIRS = 6  # with 4, orders of fewer than 20 samples are visibly not all as likely


def seeded(seed: int, what: str) -> int:
    """Return a 64-bit hash of the seed and a label; it depends on its arguments only, on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{what}".encode(), digest_size=8).digest(), "little")


class Permutations:
    """An endless shuffled sequence of samples for each domain; each sample occurs once in every epoch."""

    def __init__(self, sizes: Sequence[int], keys: Sequence[int]) -> None:
        """Set up a sequence for each domain.

        Args:
            sizes: number of samples of each domain, from 1 to `MAX_PLACE`.
            keys: 64-bit key of each domain.
        """
        assert all(1 <= size <= MAX_PLACE for size in sizes)
        columns = [isqrt(size - 1) + 1 for size in sizes]
        self._size = np.asarray(sizes, np.int64)
        self._key = np.asarray(keys, np.uint64)
        self._columns = np.asarray(columns, np.int64)
        self._rows = np.asarray([-(-size // c) for size, c in zip(sizes, columns, strict=True)], np.int64)

    def __call__(self, domain: I64, nth: I64) -> I64:
        """Return the sample at place `nth` (from 0, below `MAX_PLACE`) of a domain's sequence, elementwise."""
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
    """Map cells of the rectangle to cells with the keyed Feistel network; a cell's number is row * columns + column."""
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
    """Return half + f(other, key) modulo `modulus`; f is a finaliser with two multiplications, scaled to below
    `modulus`."""
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
    """Mix the bits of `x` with the finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


MAX_WEIGHT = 2**50
"""Largest weight of a root; slots up to twice that, times a ratio of at most a half, are off by less than one in
float64."""


class Interleaver:
    """Binary trees that deal slots to the same domains in different proportions, side by side in flat arrays."""

    def __init__(self, sources: Sequence[str], weights: Sequence[Sequence[int]]) -> None:
        """Build the trees.

        Args:
            sources: the source of each domain.
            weights: for each tree, the number of slots of each domain before the tree repeats; some are above 0, and
                their sum is at most `MAX_WEIGHT`.
        """
        self.domains = len(sources)
        self._nodes: list[tuple[int, int, int, int]] = []  # weight of the left child, of both; children
        self._roots = [self._plant(sources, tree) for tree in weights]
        # A child is a domain, or its node's number after all domains.
        nodes = np.asarray(self._nodes, np.int64).reshape(-1, 4)
        self._left, self._weight, self._children = nodes[:, 0].copy(), nodes[:, 1].copy(), nodes[:, 2:].ravel()
        # Rounded up, or a whole quotient could come out just below itself.
        self._ratio = np.nextafter(self._left / self._weight, np.inf)

    def _plant(self, sources: Sequence[str], weights: Sequence[int]) -> int:
        assert min(weights) >= 0
        assert 0 < sum(weights) <= MAX_WEIGHT
        by_source: dict[str, list[tuple[int, int]]] = {}
        for domain, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            if weight:
                by_source.setdefault(source, []).append((weight, domain))
        return self._merge([self._merge(leaves) for leaves in by_source.values()])[1]

    def _merge(self, heap: list[tuple[int, int]]) -> tuple[int, int]:
        """Merge nodes into one tree as Huffman's algorithm does: the two lightest become one until one is left.

        Takes and returns pairs of a node's weight and its number.
        """
        heapq.heapify(heap)
        while len(heap) > 1:
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            both = light[0] + heavy[0], self.domains + len(self._nodes)
            self._nodes.append((light[0], both[0], light[1], heavy[1]))
            heapq.heappush(heap, both)
        return heap[0]

    def __call__(self, tree: I64, slot: I64) -> tuple[I64, I64]:
        """Map slots of trees to (domain, number among that domain's slots of this tree), elementwise.

        Args:
            tree: the number of the tree.
            slot: the slot, from 0 to less than twice the tree's whole weight.
        """
        domain, rank = np.empty_like(slot), np.empty_like(slot)
        at, node, visitor = np.arange(len(slot)), np.asarray(self._roots).take(tree), slot
        while True:
            is_leaf = node < self.domains
            done = np.flatnonzero(is_leaf)
            if len(done):
                place = at.take(done)
                domain[place], rank[place] = node.take(done), visitor.take(done)
                on = np.flatnonzero(~is_leaf)
                if not len(on):
                    return domain, rank
                at, node, visitor = at.take(on), node.take(on), visitor.take(on)
            node, visitor = self._descend(node - self.domains, visitor)

    def _descend(self, node: I64, visitor: I64) -> tuple[I64, I64]:
        """Descend one level: return the child that each visitor goes to and the visitor's number there."""
        left, weight = self._left.take(node), self._weight.take(node)
        before = (visitor * self._ratio.take(node)).astype(np.int64)
        # Products wrap round 2^64, but a remainder is small, so its difference is right.
        remainder = visitor * left - before * weight
        wrong = remainder.view(np.uint64) >= weight.view(np.uint64)
        if wrong.any():
            off = np.where(remainder < 0, -1, 1) * wrong
            before += off
            remainder -= off * weight
        goes_right = remainder < weight - left
        return self._children.take(2 * node + goes_right), np.where(goes_right, visitor - before, before)

    def before(self, tree: int, slot: int) -> list[int]:
        """Return how many of a tree's first `slot` slots go to each domain."""
        counts = [0] * self.domains
        walk = [(self._roots[tree], slot)]
        while walk:
            node, visitors = walk.pop()
            if node < self.domains:
                counts[node] = visitors
                continue
            left, weight, *children = self._nodes[node - self.domains]
            to_left = visitors * left // weight
            walk += [(children[0], to_left), (children[1], visitors - to_left)]
        return counts


_AT_ONCE = 32_768  # positions: enough that a level of few of them costs little, few enough for a core's cache


class OrderedDomain(NamedTuple):
    name: str
    source: str
    samples: int
    """Number of samples, at least 1."""


class Phase(NamedTuple):
    start: int
    """First position of the phase; 0 for the first phase."""
    weights: Sequence[int]
    """Weight of each domain, 0 for one that is not read; the sum is at least the number of positions of the phase and
    at most 2^50."""


class Order:
    def __init__(self, seed: int, domains: Sequence[OrderedDomain], phases: Sequence[Phase]) -> None:
        """Prepare the order of a training.

        Args:
            seed: the seed of the order; another seed gives another order.
            domains: the domains that positions are dealt to.
            phases: the phases in the order of their start.
        """
        assert phases[0].start == 0
        self._deal = Interleaver([d.source for d in domains], [p.weights for p in phases])
        self._permutations = Permutations([d.samples for d in domains], [seeded(seed, d.name) for d in domains])
        self._start: list[int] = []
        self._slot: list[int] = []
        """Slot of the phase's tree at which each phase begins."""
        self._base: list[list[int]] = []
        """Number to add to a domain's slot number in the tree to get its slot number in the training, by phase and
        domain."""
        self.end = 0
        """Number of positions."""
        for number, phase in enumerate(phases):
            given = self.counts(phase.start)
            period = sum(phase.weights)
            self.end = phases[number + 1].start if number + 1 < len(phases) else phase.start + period
            assert phase.start < self.end <= min(phase.start + period, MAX_PLACE)
            slot = seeded(seed, f"phase {number}") % period
            self._start.append(phase.start)
            self._slot.append(slot)
            self._base.append([g - b for g, b in zip(given, self._deal.before(number, slot), strict=True)])
        self._to_slot = np.subtract(self._slot, self._start)
        self._bases = np.array(self._base)

    def __call__(self, position: I64) -> tuple[I64, I64]:
        """Map positions (n,) to (domain, sample of that domain), each (n,)."""
        assert not len(position) or (position.min() >= 0 and position.max() < self.end)
        domain, sample = np.empty(len(position), np.int64), np.empty(len(position), np.int64)
        for i in range(0, len(position), _AT_ONCE):
            part = slice(i, i + _AT_ONCE)
            domain[part], sample[part] = self._read(position[part])
        return domain, sample

    def _read(self, position: I64) -> tuple[I64, I64]:
        phase = np.searchsorted(self._start, position, side="right") - 1
        domain, rank = self._deal(phase, position + self._to_slot.take(phase))
        return domain, self._permutations(domain, rank + self._bases[phase, domain])

    def counts(self, position: int) -> list[int]:
        """Return the number of samples of each domain among the first `position` positions."""
        if not position:
            return [0] * self._deal.domains
        phase = bisect_left(self._start, position) - 1
        rank = self._deal.before(phase, position - self._start[phase] + self._slot[phase])
        return [b + r for b, r in zip(self._base[phase], rank, strict=True)]
