"""Figures on a model's use of its experts, computed from counts of routes.

The first paper calls an expert of a layer activated if its selections over all tokens are above "a threshold (< 1)",
whose value it does not give, and counts activated experts over all layers (arXiv 2404.15045, figure 1). Here,
therefore, the share of activated experts is a function of the threshold. Selections are counted per token: a token
whose sub-tokens go to an expert twice has selected it once.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mhmoe_ray.evaluate.request import RoutingCounts
from mhmoe_ray.runs import metrics

THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
RELATIVE = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Thresholds in units of the load that every expert would have under uniform routing."""

Counts = Sequence[Sequence[int]]
"""L x E: routes."""


def joined(counts: Iterable[RoutingCounts]) -> RoutingCounts:
    """Return the sums of the counts of several texts."""
    every = list(counts)

    def added(name: str) -> Any:
        return np.sum([np.array(getattr(one, name)) for one in every], axis=0).tolist()

    return RoutingCounts(**{name: added(name) for name in RoutingCounts.model_fields})


def load(routes: Counts) -> np.ndarray:
    """Return each expert's share of its layer's routes, times E, shape (L, E); 1 is uniform."""
    return metrics.load(np.array(routes))


def entropy(counts: RoutingCounts) -> np.ndarray:
    """Return the entropy of each layer's shares of routes, divided by its maximum, shape (L,); 1 is uniform."""
    return metrics.load_entropy(np.array(counts.counts))


def activated(counts: RoutingCounts) -> list[float]:
    """Return, for each of THRESHOLDS, the share of all experts of all layers that more than this share of tokens
    select."""
    selected = np.array(counts.tokens_of) / max(1, counts.tokens)
    return [float((selected > threshold).mean()) for threshold in THRESHOLDS]


def activated_relative(routes: Counts) -> list[float]:
    """Return, for each of RELATIVE, the share of all experts of all layers whose load exceeds this multiple of a
    uniform load.

    These shares are comparable between models with different numbers of experts or routes; those of `activated` are
    not.
    """
    return [float((load(routes) > threshold).mean()) for threshold in RELATIVE]


def distinct_experts(counts: RoutingCounts) -> np.ndarray:
    """Return the mean number of different experts that the sub-tokens of one token go to together, shape (L,)."""
    histogram = np.array(counts.distinct, float)
    return np.asarray(histogram @ np.arange(histogram.shape[1]) / histogram.sum(1).clip(min=1))


def head_agreement(counts: RoutingCounts) -> np.ndarray:
    """Return how often two sub-tokens of a token have the same first choice, as a share of tokens, shape (L, h, h)."""
    return np.asarray(np.array(counts.agreement, float) / max(1, counts.tokens))


def mean_agreement(counts: RoutingCounts) -> np.ndarray | None:
    """Return the mean of `head_agreement` over all pairs of different heads, shape (L,); None for a model with one
    head."""
    agreement = head_agreement(counts)
    heads = agreement.shape[1]
    if heads == 1:
        return None
    return np.asarray((agreement.sum((1, 2)) - heads) / (heads * (heads - 1)))


def first_weight(counts: RoutingCounts) -> np.ndarray:
    """Return the mean weight of a sub-token's first choice, shape (L,)."""
    return np.asarray(np.array(counts.first_weight) / max(1, counts.tokens * len(counts.agreement[0])))


def specialisation(of: RoutingCounts, whole: RoutingCounts) -> float:
    """Return how far the routes of one text are from those of all texts.

    This is half the sum of the absolute differences of the experts' shares, averaged over layers: 0 means equal routes,
    1 means that the experts used are disjoint.
    """
    difference = np.abs(load(of.counts) - load(whole.counts)).sum(1) / len(whole.counts[0]) / 2
    return float(difference.mean())
