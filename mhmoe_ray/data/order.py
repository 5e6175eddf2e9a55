"""The order of training samples: a pure function of (seed, position), whoever asks and whenever.

A position is the number of a sample in the whole training, from 0. Step s of M micro-batches of b sequences reads
positions s*M*b .. (s+1)*M*b - 1, micro-batch by micro-batch.

Which domain: a phase of the training has whole-number weights and deals positions by them (interleave.py), from a
seeded place of that sequence on. At every prefix of the phase a source is within 3.36 samples of its share and a domain
within 6.72; a phase as long as its weights together reads exactly its weights.
Which of its samples: the n-th slot of a domain, counted over all phases, takes sample n mod size of epoch n // size in
that epoch's permutation (permutation.py). The permutation depends on seed, name and size of the domain only, so another
mixture reads the same domain in the same order.

Both are closed formulas: a position costs a walk of a few levels, wherever it lies.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.interleave import Interleaver
from mhmoe_ray.data.permutation import I64, MAX_PLACE, Permutations, seeded

_AT_ONCE = 32_768  # positions: enough that a level of few of them costs little, few enough for a core's cache


class OrderedDomain(NamedTuple):
    name: str
    source: str
    samples: int
    """At least 1."""


class Phase(NamedTuple):
    start: int
    """Its first position; 0 for the first phase."""
    weights: Sequence[int]
    """Of each domain, 0 for none; together at least the positions of the phase and at most 2^50."""


class _Stretch(NamedTuple):
    """Positions from `start` on take the slots from `slot` on of the tree of this number."""

    start: int
    tree: int
    slot: int
    base: list[int]
    """What to add to a slot's number in the tree to get its number in the training, by domain."""


class Order:
    def __init__(self, seed: int, domains: Sequence[OrderedDomain], phases: Sequence[Phase]) -> None:
        """Args:
        seed: another seed, another order.
        domains: what a position may be.
        phases: by start.
        """
        assert phases[0].start == 0
        self._deal = Interleaver([d.source for d in domains], [p.weights for p in phases])
        self._permutations = Permutations([d.samples for d in domains], [seeded(seed, d.name) for d in domains])
        self._stretches: list[_Stretch] = []
        self.end = 0
        """Positions there are."""
        for number, phase in enumerate(phases):
            given = self.counts(phase.start)
            period = sum(phase.weights)
            slot = seeded(seed, f"phase {number}") % period
            self.end = phases[number + 1].start if number + 1 < len(phases) else phase.start + period
            assert phase.start < self.end <= phase.start + period
            base = [g - b for g, b in zip(given, self._deal.before(number, slot), strict=True)]
            self._stretches.append(_Stretch(phase.start, number, slot, base))
            repeats = phase.start + period - slot
            if repeats < self.end:
                base = [b + w for b, w in zip(base, phase.weights, strict=True)]
                self._stretches.append(_Stretch(repeats, number, 0, base))
        assert self.end <= MAX_PLACE
        self._start = np.array([s.start for s in self._stretches])
        self._tree = np.array([s.tree for s in self._stretches])
        self._to_slot = np.array([s.slot - s.start for s in self._stretches])
        self._base = np.array([s.base for s in self._stretches])

    def __call__(self, position: I64) -> tuple[I64, I64]:
        """Positions (n,) to (domain, sample of that domain), each (n,)."""
        assert not len(position) or (position.min() >= 0 and position.max() < self.end)
        domain, sample = np.empty(len(position), np.int64), np.empty(len(position), np.int64)
        for i in range(0, len(position), _AT_ONCE):
            part = slice(i, i + _AT_ONCE)
            domain[part], sample[part] = self._read(position[part])
        return domain, sample

    def _read(self, position: I64) -> tuple[I64, I64]:
        stretch = np.searchsorted(self._start, position, side="right") - 1
        domain, rank = self._deal(self._tree.take(stretch), position + self._to_slot.take(stretch))
        return domain, self._permutations(domain, rank + self._base[stretch, domain])

    def counts(self, position: int) -> list[int]:
        """Samples of each domain among the first `position` ones."""
        if not position:
            return [0] * self._deal.domains
        stretch = self._stretches[bisect_right(self._stretches, position - 1, key=lambda s: s.start) - 1]
        rank = self._deal.before(stretch.tree, position - stretch.start + stretch.slot)
        return [b + r for b, r in zip(stretch.base, rank, strict=True)]
