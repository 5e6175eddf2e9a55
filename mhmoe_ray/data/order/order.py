"""The order of training samples: a pure function of (seed, position), whoever asks and whenever.

A position is the number of a sample in the whole training, from 0. Step s of M micro-batches of b sequences reads
positions s*M*b .. (s+1)*M*b - 1, micro-batch by micro-batch.

| what                                  | depends on                                              | where          |
| ------------------------------------- | ------------------------------------------------------- | -------------- |
| the samples of a domain, and their    | its files' names and text, tokenizer, T, packing, which | data/prepare/  |
| numbers from 0                        | documents are held out                                  |                |
| weights of domains in each phase      | the spec's mixture, numbers of samples, steps * M * b   | mixture.py     |
| the domain at a position              | seed, weights of its phase                              | interleave.py  |
| that domain's slot there, n           | how often it was dealt before, over all phases          | interleave.py  |
| the sample of slot n                  | seed, name and size of the domain, n                    | permutation.py |
| the rank that reads a position        | world, b: micro-batch m is rank m mod world's           | data/stream.py |

So the text of a step is the same at any number of workers.

Which domain: a phase of the training has whole-number weights and deals positions by them (interleave.py), from a
seeded place of that sequence on. At every prefix of the phase a source is within 3.36 samples of its share and a domain
within 6.72; a phase as long as its weights together reads exactly its weights.
Which of its samples: the n-th slot of a domain, counted over all phases, takes sample n mod size of epoch n // size in
that epoch's permutation (permutation.py). The permutation depends on seed, name and size of the domain only, so another
mixture reads the same domain in the same order.

Both are closed formulas: a position costs a walk of a few levels, wherever it lies.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.order.interleave import Interleaver
from mhmoe_ray.data.order.permutation import I64, MAX_PLACE, Permutations, seeded

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
        self._start: list[int] = []
        self._slot: list[int] = []
        """The tree's slot that a phase begins at."""
        self._base: list[list[int]] = []
        """What to add to a slot's number in the tree to get its number in the training, by phase and domain."""
        self.end = 0
        """Positions there are."""
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
        """Positions (n,) to (domain, sample of that domain), each (n,)."""
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
        """Samples of each domain among the first `position` ones."""
        if not position:
            return [0] * self._deal.domains
        phase = bisect_left(self._start, position) - 1
        rank = self._deal.before(phase, position - self._start[phase] + self._slot[phase])
        return [b + r for b, r in zip(self._base[phase], rank, strict=True)]
