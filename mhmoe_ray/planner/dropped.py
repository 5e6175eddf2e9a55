"""Routes that static routing drops where no expert is favoured."""

import math

from mhmoe_ray.spec import MoESpec


def dropped_by_chance(moe: MoESpec, rows: int) -> float:
    """Share of the routes that find no place, if each row chooses its k experts evenly and at random and wants all.

    An expert's load is then binomial, of N draws at k / E. A router that favours some experts drops more; one whose
    loads are more even than chance makes them drops less. With `second_expert: random` it is the most by chance: the
    second choices that are left out want no place, and leave theirs to others. 0 where routing is dropless.
    """
    places, p = moe.places(rows), moe.top_k / moe.experts
    if places is None or places >= rows:
        return 0.0
    if p == 1:
        return 1 - places / rows
    mean, spread = rows * p, math.sqrt(rows * p * (1 - p))
    # Farther out, or 30 rows farther where the distribution is narrow and has a long tail, no load is ever seen.
    likely = range(max(places + 1, math.floor(mean - 12 * spread)), min(rows, math.ceil(mean + 12 * spread) + 30) + 1)
    return sum((load - places) * _chance(load, rows, p) for load in likely) / mean


def _chance(load: int, rows: int, p: float) -> float:
    """Binomial."""
    ways = math.lgamma(rows + 1) - math.lgamma(load + 1) - math.lgamma(rows - load + 1)
    return math.exp(ways + load * math.log(p) + (rows - load) * math.log1p(-p))
