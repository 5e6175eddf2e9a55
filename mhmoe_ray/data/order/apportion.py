"""Whole numbers in proportion to weights, under limits."""

from collections.abc import Sequence


def apportion(total: int, weights: Sequence[float], limits: Sequence[int], offset: float) -> list[int]:
    """Split `total` in proportion to weights; who would get more than its limit gets that, and the others the rest in
    proportion. Exact: the numbers add up to the total, none is above its limit, and those below it are their exact
    parts of the rest rounded down or up.

    Args:
        total: at least 0, at most the limits of positive weights together.
        weights: at least 0, some above it.
        limits: at least 0.
        offset: from 0 to below 1, shifts who is rounded up. Drawn evenly, each has its exact part on average.
    """
    ratios = [w.as_integer_ratio() for w in map(float, weights)]
    scale = max(denominator for _, denominator in ratios)  # all are powers of two
    exact = [numerator * (scale // denominator) for numerator, denominator in ratios]
    counts, below = [0] * len(exact), [i for i, w in enumerate(exact) if w]
    while below:
        whole = sum(exact[i] for i in below)
        full = {i for i in below if total * exact[i] >= limits[i] * whole}
        if not full:
            break
        for i in full:
            counts[i] = limits[i]
        total -= sum(limits[i] for i in full)
        below = [i for i in below if i not in full]
    assert total == 0 or (below and total > 0), "the limits allow the total"
    if below:
        edge, numerator, denominator = 0, *offset.as_integer_ratio()
        reached = 0
        for i in below:
            edge += exact[i]
            up_to = (total * edge * denominator + whole * numerator) // (whole * denominator)
            counts[i] = up_to - reached
            reached = up_to
    return counts
