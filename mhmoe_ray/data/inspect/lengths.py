"""A histogram of lengths that adds up exactly, whatever the order: 16 bins an octave.

Lengths up to 32 have bins of their own; above, a bin is at most a sixteenth of its length wide. So counts by octave are
exact, and a quantile is at most a sixteenth below the true one.
"""

from collections import Counter
from collections.abc import Mapping

STEPS = 4  # halvings of an octave


def bin_of(length: int) -> int:
    """The smallest length of its bin."""
    shift = max(0, length.bit_length() - 1 - STEPS)
    return length >> shift << shift


def quantile(bins: Mapping[int, int], share: float) -> int:
    """The smallest bin that has, with those below it, at least this share of all; 0 if there is none."""
    wanted, seen = share * sum(bins.values()), 0
    for lowest in sorted(bins):
        seen += bins[lowest]
        if seen >= wanted:
            return lowest
    return 0


def octaves(bins: Mapping[int, int]) -> dict[int, int]:
    """Counts by the power of two that a length is at least; 0 has its own. Without gaps, ascending."""
    found: Counter[int] = Counter()
    for lowest, count in bins.items():
        found[1 << lowest.bit_length() - 1 if lowest else 0] += count
    if not found:
        return {}
    result, octave = {0: found[0]} if found[0] else {}, min((o for o in found if o), default=1)
    while octave <= max(found):
        result[octave] = found[octave]
        octave *= 2
    return result
