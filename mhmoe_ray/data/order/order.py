"""The order of training samples: a pure function of (seed, position), the same for every process at every time.

A position is the number of a sample in the whole training, from 0. Step s of M micro-batches of b sequences reads
positions s*M*b .. (s+1)*M*b - 1, micro-batch by micro-batch.

| value                                 | depends on                                              | computed in    |
| ------------------------------------- | ------------------------------------------------------- | -------------- |
| the samples of a domain, and their    | its files' names and text, tokenizer, T, packing, which | data/prepare/  |
| numbers from 0                        | documents are held out                                  |                |
| weights of domains in each phase      | the spec's mixture, numbers of samples, steps * M * b   | mixture.py     |
| the domain at a position              | seed, weights of its phase                              | `Order`        |
| that domain's slot, n                 | how many earlier positions it has, over all phases      | `Order`        |
| the sample of slot n                  | seed, name and size of the domain, n                    | `Permutations` |
| the rank that reads a position        | world size, b: rank m mod world size reads batch m      | data/stream.py |

So the text of a step is the same at any number of workers.

The domain of a position: a phase of the training has whole-number weights and assigns its positions to domains in
proportion to them, starting at a seeded slot of an endless sequence. In every prefix of the phase a source is within
3.36 samples of its share and a domain within 6.72; a phase whose length is the sum of its weights reads exactly its
weights.

The sample within the domain: slot n of a domain, counted from 0 over all phases, belongs to epoch n // size and takes
element n mod size of that epoch's permutation. The permutation depends on seed, name and size of the domain only, so
another mixture reads the same domain in the same order. A run with `start.order: continue` counts on from the slots
that the run before it has read, so the two read a domain as one longer run would.

Both are closed formulas: the cost of a position is a walk down a few levels of a tree, wherever the position lies.

Assigning slots to domains: `Interleaver` computes which domain any slot of an endless sequence goes to, in any
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

MAX_POSITION = 2**52
"""Upper bound of slots and positions. The quotient of two whole numbers below it, computed in float64, is never rounded
up to the next whole number."""

# This is the number of pairs of Feistel rounds. With only 4 pairs, the possible orders of fewer than 20 samples are
# visibly not equally likely.
ROUND_PAIRS = 6


def seeded_hash(seed: int, label: str) -> int:
    """Return a 64-bit hash of a seed and a label, from 0 to 2^64 - 1; it is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{label}".encode(), digest_size=8).digest(), "little")


class Permutations:
    """Endless shuffled sequences of samples, one for each domain; each sample occurs once in every epoch."""

    def __init__(self, sizes: Sequence[int], keys: Sequence[int]) -> None:
        """Set up a sequence for each domain.

        Args:
            sizes: number of samples of each domain, from 1 to `MAX_POSITION`.
            keys: 64-bit key of each domain.
        """
        assert all(1 <= size <= MAX_POSITION for size in sizes)
        # A nearly square rectangle has few cells outside of the permutation, so few values go through the network
        # again.
        columns = [isqrt(size - 1) + 1 for size in sizes]
        self._sizes = np.asarray(sizes, np.int64)
        self._keys = np.asarray(keys, np.uint64)
        self._columns = np.asarray(columns, np.int64)
        self._rows = np.asarray([-(-size // c) for size, c in zip(sizes, columns, strict=True)], np.int64)

    def __call__(self, domain: I64, slot: I64) -> I64:
        """Return the number of the sample in each slot of a domain's sequence, elementwise.

        Args:
            domain: the number of the domain.
            slot: the slot, from 0 to less than `MAX_POSITION`, counted over all epochs.
        """
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
    """Map cells of the rectangle with the keyed Feistel network; the number of a cell is row * columns + column."""
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
    """Return target_half + f(source_half, key) modulo `modulus`; f mixes bits and scales the result to below
    `modulus`."""
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
    """Mix the bits of `x` with the finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


MAX_WEIGHT = 2**50
"""Largest weight of a root; slots up to twice that, times a ratio of at most a half, are off by less than one in
float64."""


class Interleaver:
    """Binary trees that assign the slots of endless sequences to the same domains, each in proportions of its own."""

    def __init__(self, sources: Sequence[str], weights: Sequence[Sequence[int]]) -> None:
        """Build the trees.

        Args:
            sources: the source of each domain.
            weights: for each tree, the number of slots of each domain before the tree repeats; some are above 0, and
                their sum is at most `MAX_WEIGHT`.
        """
        self.domain_count = len(sources)
        # A node is a tuple: the weight of its left child, the sum of the weights of both children, and the two
        # children. The nodes of all trees are in one list, so that a walk can descend different trees in one array
        # operation.
        self._nodes: list[tuple[int, int, int, int]] = []
        self._roots = [self._build_tree(sources, tree) for tree in weights]
        # A child is the number of a domain, or `domain_count` plus the index of a node.
        nodes = np.asarray(self._nodes, np.int64).reshape(-1, 4)
        self._left_weights, self._weights, self._children = nodes[:, 0].copy(), nodes[:, 1].copy(), nodes[:, 2:].ravel()
        # The ratio is rounded up. Otherwise a product that should be a whole number could come out just below that
        # number, and would be truncated to the number before it.
        self._ratios = np.nextafter(self._left_weights / self._weights, np.inf)

    def _build_tree(self, sources: Sequence[str], weights: Sequence[int]) -> int:
        """Add the nodes of one tree, with each source's domains in a subtree; return the number of the root."""
        assert min(weights) >= 0
        assert 0 < sum(weights) <= MAX_WEIGHT
        by_source: dict[str, list[tuple[int, int]]] = {}
        for domain, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            if weight:
                by_source.setdefault(source, []).append((weight, domain))
        return self._merge_nodes([self._merge_nodes(leaves) for leaves in by_source.values()])[1]

    def _merge_nodes(self, heap: list[tuple[int, int]]) -> tuple[int, int]:
        """Merge nodes into one tree as Huffman's algorithm does: repeatedly merge the two lightest.

        The heap holds pairs of a node's weight and its number; the result is the pair of the root.
        """
        heapq.heapify(heap)
        while len(heap) > 1:
            light_node, heavy_node = heapq.heappop(heap), heapq.heappop(heap)
            parent = light_node[0] + heavy_node[0], self.domain_count + len(self._nodes)
            self._nodes.append((light_node[0], parent[0], light_node[1], heavy_node[1]))
            heapq.heappush(heap, parent)
        return heap[0]

    def __call__(self, tree: I64, slot: I64) -> tuple[I64, I64]:
        """Map slots of trees to (domain, number among that domain's slots of this tree), elementwise.

        Args:
            tree: the number of the tree.
            slot: the slot, from 0 to less than twice the tree's whole weight.
        """
        domain, rank = np.empty_like(slot), np.empty_like(slot)
        # `indices` holds the indices, in the result, of the slots whose walk is not finished.
        indices, node, visitor = np.arange(len(slot)), np.asarray(self._roots).take(tree), slot
        while True:
            is_leaf = node < self.domain_count
            finished = np.flatnonzero(is_leaf)
            if len(finished):
                finished_indices = indices.take(finished)
                domain[finished_indices], rank[finished_indices] = node.take(finished), visitor.take(finished)
                unfinished = np.flatnonzero(~is_leaf)
                if not len(unfinished):
                    return domain, rank
                indices, node, visitor = indices.take(unfinished), node.take(unfinished), visitor.take(unfinished)
            node, visitor = self._descend(node - self.domain_count, visitor)

    def _descend(self, node: I64, visitor: I64) -> tuple[I64, I64]:
        """Descend one level: return the child that each visitor goes to and the visitor's number at that child."""
        left_weight, weight = self._left_weights.take(node), self._weights.take(node)
        left_visitor = (visitor * self._ratios.take(node)).astype(np.int64)
        # The products wrap round 2^64, but their difference is small, so the remainder is right.
        remainder = visitor * left_weight - left_visitor * weight
        is_off = remainder.view(np.uint64) >= weight.view(np.uint64)
        if is_off.any():
            correction = np.where(remainder < 0, -1, 1) * is_off
            left_visitor += correction
            remainder -= correction * weight
        goes_right = remainder < weight - left_weight
        return self._children.take(2 * node + goes_right), np.where(goes_right, visitor - left_visitor, left_visitor)

    def slot_counts(self, tree: int, slot: int) -> list[int]:
        """Return the number of slots of each domain among a tree's first `slot` slots."""
        counts = [0] * self.domain_count
        pending_nodes = [(self._roots[tree], slot)]
        while pending_nodes:
            node, visitors = pending_nodes.pop()
            if node < self.domain_count:
                counts[node] = visitors
                continue
            left_weight, weight, *children = self._nodes[node - self.domain_count]
            left_visitors = visitors * left_weight // weight
            pending_nodes += [(children[0], left_visitors), (children[1], visitors - left_visitors)]
        return counts


# This is the number of positions in one call. Many positions share the overhead of each tree level, and the arrays of
# even more would not fit into a core's cache.
_POSITIONS_PER_CALL = 32_768


class OrderedDomain(NamedTuple):
    """Domain whose samples an order arranges."""

    name: str
    source: str
    samples: int
    """Number of samples, at least 1 in an `Order`."""


class Phase(NamedTuple):
    """Stretch of positions that are assigned to domains by the same weights."""

    start: int
    """First position of the phase; 0 for the first phase."""
    weights: Sequence[int]
    """Weight of each domain, 0 for one that is not read; the sum is at least the number of positions of the phase and
    at most 2^50."""


class Order:
    """Order of a training, or of a part of its micro-batches: it maps each position to a domain and a sample of that
    domain."""

    def __init__(
        self,
        seed: int,
        domains: Sequence[OrderedDomain],
        phases: Sequence[Phase],
        first_slots: Sequence[int] | None = None,
    ) -> None:
        """Prepare the order of a training.

        Args:
            seed: the seed of the order; another seed gives another order.
            domains: the domains that positions are assigned to.
            phases: the phases in the order of their start.
            first_slots: the slot of each domain's endless sequence at which it begins; by default 0. A run that
                continues the order of another begins where that run stopped.
        """
        assert phases[0].start == 0
        self._first_slots = [0] * len(domains) if first_slots is None else list(first_slots)
        self._interleaver = Interleaver([d.source for d in domains], [p.weights for p in phases])
        self._permutations = Permutations([d.samples for d in domains], [seeded_hash(seed, d.name) for d in domains])
        self._starts: list[int] = []
        self._slots: list[int] = []
        """Slot of the phase's tree at which each phase begins."""
        self._rank_offsets: list[list[int]] = []
        """Number to add to a domain's slot number in the tree to get its slot number in the training, by phase and
        domain."""
        self.position_count = 0
        """Number of positions."""
        for phase_number, phase in enumerate(phases):
            start_counts = [
                first_slot + count
                for first_slot, count in zip(self._first_slots, self.domain_counts(phase.start), strict=True)
            ]
            period = sum(phase.weights)
            self.position_count = (
                phases[phase_number + 1].start if phase_number + 1 < len(phases) else phase.start + period
            )
            assert phase.start < self.position_count <= min(phase.start + period, MAX_POSITION)
            # The phase starts at a seeded slot, so that the sequence of domains depends on the seed, too.
            slot = seeded_hash(seed, f"phase {phase_number}") % period
            self._starts.append(phase.start)
            self._slots.append(slot)
            self._rank_offsets.append(
                [
                    start_count - skipped_count
                    for start_count, skipped_count in zip(
                        start_counts, self._interleaver.slot_counts(phase_number, slot), strict=True
                    )
                ]
            )
        self._slot_shifts = np.subtract(self._slots, self._starts)
        self._offset_table = np.array(self._rank_offsets)

    def __call__(self, position: I64) -> tuple[I64, I64]:
        """Map positions (n,) to (domain, sample of that domain), each (n,)."""
        assert not len(position) or (position.min() >= 0 and position.max() < self.position_count)
        domain, sample = np.empty(len(position), np.int64), np.empty(len(position), np.int64)
        for i in range(0, len(position), _POSITIONS_PER_CALL):
            part = slice(i, i + _POSITIONS_PER_CALL)
            domain[part], sample[part] = self._locate(position[part])
        return domain, sample

    def _locate(self, position: I64) -> tuple[I64, I64]:
        """Map positions to (domain, sample of that domain), all in one call."""
        phase = np.searchsorted(self._starts, position, side="right") - 1
        domain, rank = self._interleaver(phase, position + self._slot_shifts.take(phase))
        return domain, self._permutations(domain, rank + self._offset_table[phase, domain])

    def domain_counts(self, position: int) -> list[int]:
        """Return the number of samples of each domain among the first `position` positions, without `first_slots`."""
        if not position:
            return [0] * self._interleaver.domain_count
        phase = bisect_left(self._starts, position) - 1
        slot_counts = self._interleaver.slot_counts(phase, position - self._starts[phase] + self._slots[phase])
        return [
            offset + count - first_slot
            for offset, count, first_slot in zip(self._rank_offsets[phase], slot_counts, self._first_slots, strict=True)
        ]


class PartedOrder:
    """Order of a training whose micro-batches have parts, each of a fixed size and with an order of its own.

    The samples of a micro-batch are those of its parts, one part after another. Those of micro-batch m in a part of b
    samples have positions m*b .. (m+1)*b - 1 in the part's order.
    """

    def __init__(self, orders: Sequence[Order], sizes: Sequence[int], domains: Sequence[Sequence[int]]) -> None:
        """Combine the orders of the parts.

        Args:
            orders: order of each part.
            sizes: number of samples of each part in a micro-batch.
            domains: for each part, the number in the result of each domain of its order.
        """
        self._orders, self._sizes = orders, sizes
        self._domains = [np.asarray(numbers, np.int64) for numbers in domains]
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes

    def __call__(self, position: I64) -> tuple[I64, I64]:
        """Map positions (n,) to (domain, sample of that domain), each (n,)."""
        batch, row = np.divmod(position, self._ends[-1])
        part_of_row = np.searchsorted(self._ends, row, side="right")
        domain, sample = np.empty_like(position), np.empty_like(position)
        for part, (order, size) in enumerate(zip(self._orders, self._sizes, strict=True)):
            rows = np.flatnonzero(part_of_row == part)
            part_domain, sample[rows] = order(batch[rows] * size + row[rows] - self._starts[part])
            domain[rows] = self._domains[part].take(part_domain)
        return domain, sample

    def domain_counts(self, position: int) -> list[int]:
        """Return the number of samples of each domain among the first `position` positions."""
        batch, row = divmod(position, int(self._ends[-1]))
        counts = [0] * sum(map(len, self._domains))
        for part, (order, size) in enumerate(zip(self._orders, self._sizes, strict=True)):
            part_position = batch * size + min(max(row - int(self._starts[part]), 0), size)
            for number, count in zip(self._domains[part], order.domain_counts(part_position), strict=True):
                counts[number] = count
        return counts
