"""The order of training samples: a pure function of (seed, position), the same for every process at every time.

A position is the number of a sample in the whole training. Step s of M micro-batches of b sequences reads positions
s*M*b .. (s+1)*M*b - 1, micro-batch by micro-batch.

| value                                 | depends on                                              | computed in    |
| ------------------------------------- | ------------------------------------------------------- | -------------- |
| the samples of a domain, and their    | its files' names and text, tokenizer, T, packing, which | data/prepare/  |
| numbers from 0                        | documents are held out                                  |                |
| weights of domains in each phase      | the spec's mixture, numbers of samples, steps * M * b   | mixture.py     |
| the domain at a position              | seed, weights of its phase                              | `Order`        |
| that domain's slot, n                 | how many earlier positions it has, over all phases      | `Order`        |
| the sample of slot n                  | seed, name and size of the domain, n                    | `Permutations` |
| the rank that reads a position        | world size, b: rank m mod world size reads batch m      | data/stream.py |

Only the last row depends on the number of workers, so a step reads the same text with any number of them.

A phase starts at a seeded slot of an endless sequence of domains in proportion to its integer weights. In every prefix
of the phase a source is within 3.36 samples of its share and a domain within 6.72 (interleaver.py); a phase whose
length is the sum of its weights reads exactly its weights. Slot n takes element n mod size of the permutation of epoch
n // size, so another mixture reads the same domain in the same order. A run with `start.order: continue` counts on from
the slots that the run before it has read, so the two runs read a domain as one longer run would.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.draws import seeded_hash
from mhmoe_ray.data.order.interleaver import Interleaver
from mhmoe_ray.data.order.permutation import I64, MAX_POSITION, Permutations

# Number of positions of the order that are computed together. They share the overhead of each step down a tree, but the
# arrays of even more positions would not fit into a core's cache.
_POSITIONS_PER_CALL = 32_768


class OrderedDomain(NamedTuple):
    """Domain whose samples `Order` puts into an order."""

    name: str
    source: str
    samples: int
    """At least 1 in an `Order`."""


class Phase(NamedTuple):
    """Stretch of positions in which the weights of the domains stay the same."""

    start: int
    """First position of the phase; 0 for the first phase."""
    weights: Sequence[int]
    """Weight of each domain. Their sum is at least the phase's number of positions and at most 2^50."""


class Order:
    """Order in which a training, or one part of its micro-batches, reads its domains.

    `first_slots` has each domain's samples that earlier runs, whose order this run continues, have read.
    """

    def __init__(
        self,
        seed: int,
        domains: Sequence[OrderedDomain],
        phases: Sequence[Phase],
        first_slots: Sequence[int] | None = None,
    ) -> None:
        assert phases[0].start == 0
        self._first_slots = [0] * len(domains) if first_slots is None else list(first_slots)
        self._interleaver = Interleaver([d.source for d in domains], [p.weights for p in phases])
        self._permutations = Permutations([d.samples for d in domains], [seeded_hash(seed, d.name) for d in domains])
        self._starts: list[int] = []
        self._slots: list[int] = []
        """Slot at which each phase begins in its sequence of domains."""
        self._rank_offsets: list[list[int]] = []
        """Difference between a domain's slot number in the training and in the tree, by phase and domain."""
        self.position_count = 0
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
            # The seed selects the slot at which a phase enters its repeating sequence of domains, so that this sequence
            # depends on the seed, too.
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
        """Return the domain and the number of the sample within it at each position, (n,)."""
        assert not len(position) or (position.min() >= 0 and position.max() < self.position_count)
        domain, sample = np.empty(len(position), np.int64), np.empty(len(position), np.int64)
        for i in range(0, len(position), _POSITIONS_PER_CALL):
            part = slice(i, i + _POSITIONS_PER_CALL)
            domain[part], sample[part] = self._locate(position[part])
        return domain, sample

    def _locate(self, position: I64) -> tuple[I64, I64]:
        """Compute `__call__` for so few positions that their arrays fit into a core's cache."""
        phase = np.searchsorted(self._starts, position, side="right") - 1
        domain, rank = self._interleaver(phase, position + self._slot_shifts.take(phase))
        return domain, self._permutations(domain, rank + self._offset_table[phase, domain])

    def domain_counts(self, position: int) -> list[int]:
        """Return the samples of each domain that this run reads at its first `position` positions."""
        if not position:
            return [0] * self._interleaver.domain_count
        phase = bisect_left(self._starts, position) - 1
        slot_counts = self._interleaver.slot_counts(phase, position - self._starts[phase] + self._slots[phase])
        return [
            offset + count - first_slot
            for offset, count, first_slot in zip(self._rank_offsets[phase], slot_counts, self._first_slots, strict=True)
        ]


class PartedOrder:
    """Order of a training whose micro-batches consist of parts, each of a fixed size and with its own order.

    For a part of b samples, those of micro-batch m are at positions m*b .. (m+1)*b - 1 of the part's order. `domains`
    numbers each part's domains in the combined order.
    """

    def __init__(self, orders: Sequence[Order], sizes: Sequence[int], domains: Sequence[Sequence[int]]) -> None:
        self._orders, self._sizes = orders, sizes
        self._domains = [np.asarray(numbers, np.int64) for numbers in domains]
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes

    def __call__(self, position: I64) -> tuple[I64, I64]:
        """Return the domain and the number of the sample within it at each position, (n,)."""
        batch, row = np.divmod(position, self._ends[-1])
        part_of_row = np.searchsorted(self._ends, row, side="right")
        domain, sample = np.empty_like(position), np.empty_like(position)
        for part, (order, size) in enumerate(zip(self._orders, self._sizes, strict=True)):
            rows = np.flatnonzero(part_of_row == part)
            part_domain, sample[rows] = order(batch[rows] * size + row[rows] - self._starts[part])
            domain[rows] = self._domains[part].take(part_domain)
        return domain, sample

    def domain_counts(self, position: int) -> list[int]:
        """Return the samples of each domain among the first `position` positions."""
        batch, row = divmod(position, int(self._ends[-1]))
        counts = [0] * sum(map(len, self._domains))
        for part, (order, size) in enumerate(zip(self._orders, self._sizes, strict=True)):
            part_position = batch * size + min(max(row - int(self._starts[part]), 0), size)
            for number, count in zip(self._domains[part], order.domain_counts(part_position), strict=True):
                counts[number] = count
        return counts
