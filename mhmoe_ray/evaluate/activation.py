"""What counts of routes say of a model's use of its experts.

The first paper calls an expert of a layer activated where its selections over all tokens are above "a threshold (< 1)"
that it does not give, and counts activated experts over all layers (arXiv 2404.15045, figure 1). So here the share is a
function of the threshold. Selections are of tokens: one whose sub-tokens go to an expert twice has selected it once.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mhmoe_ray.evaluate.request import RoutingCounts
from mhmoe_ray.runs import metrics

THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
RELATIVE = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Thresholds in units of what every expert would have if all had the same."""

Counts = Sequence[Sequence[int]]
"""L x E: routes."""


def joined(counts: Iterable[RoutingCounts]) -> RoutingCounts:
    """Of several texts together."""
    every = list(counts)

    def added(name: str) -> Any:
        return np.sum([np.array(getattr(one, name)) for one in every], axis=0).tolist()

    return RoutingCounts(**{name: added(name) for name in RoutingCounts.model_fields})


def load(routes: Counts) -> np.ndarray:
    """(L, E): an expert's share of its layer's routes, times E; 1 is uniform."""
    return metrics.load(np.array(routes))


def entropy(counts: RoutingCounts) -> np.ndarray:
    """(L,): of the shares, over the highest; 1 is uniform."""
    return metrics.load_entropy(np.array(counts.counts))


def activated(counts: RoutingCounts) -> list[float]:
    """Share of all experts of all layers that more than this share of the tokens select, by THRESHOLDS."""
    selected = np.array(counts.tokens_of) / max(1, counts.tokens)
    return [float((selected > threshold).mean()) for threshold in THRESHOLDS]


def activated_relative(routes: Counts) -> list[float]:
    """Share of all experts of all layers with more than this share of a uniform load, by RELATIVE: comparable between
    models with different numbers of experts or routes, which `activated` is not."""
    return [float((load(routes) > threshold).mean()) for threshold in RELATIVE]


def distinct_experts(counts: RoutingCounts) -> np.ndarray:
    """(L,): mean number of different experts that a token's sub-tokens go to together."""
    histogram = np.array(counts.distinct, float)
    return np.asarray(histogram @ np.arange(histogram.shape[1]) / histogram.sum(1).clip(min=1))


def head_agreement(counts: RoutingCounts) -> np.ndarray:
    """(L, h, h): how often two sub-tokens of a token have the same first choice."""
    return np.asarray(np.array(counts.agreement, float) / max(1, counts.tokens))


def mean_agreement(counts: RoutingCounts) -> np.ndarray | None:
    """(L,): over all pairs of different heads; None with one head."""
    agreement = head_agreement(counts)
    heads = agreement.shape[1]
    if heads == 1:
        return None
    return np.asarray((agreement.sum((1, 2)) - heads) / (heads * (heads - 1)))


def first_weight(counts: RoutingCounts) -> np.ndarray:
    """(L,): mean weight of a sub-token's first choice."""
    return np.asarray(np.array(counts.first_weight) / max(1, counts.tokens * len(counts.agreement[0])))


def specialisation(of: RoutingCounts, whole: RoutingCounts) -> float:
    """How far a text's routes are from those of all texts: half the sum of absolute differences of the experts' shares,
    mean over layers. 0 is equal, 1 is other experts altogether."""
    difference = np.abs(load(of.counts) - load(whole.counts)).sum(1) / len(whole.counts[0]) / 2
    return float(difference.mean())
