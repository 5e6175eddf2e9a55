"""Statistics on a model's use of its experts, computed from counts of routes (choices of an expert by a sub-token).

L is the number of mixture-of-experts layers, E the number of experts of a layer and h the number of heads.

An expert is activated if the share of tokens that select it is above a threshold. Selections are counted per token: a
token with two sub-tokens that go to the same expert has selected it once.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mhmoe_ray.evaluate.request import RoutingCounts
from mhmoe_ray.runs import metrics

# The first MH-MoE paper counts the experts of all layers whose selections are above "a threshold (< 1)" (arXiv
# 2404.15045, figure 1). It does not give the threshold's value, so the share of activated experts is computed for
# several thresholds.
THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
RELATIVE_THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Thresholds of an expert's load, in units of the load that every expert would have under uniform routing."""

RouteCounts = Sequence[Sequence[int]]
"""L x E: number of routes (choices by sub-tokens) to each expert of each layer."""


def sum_counts(counts: Iterable[RoutingCounts]) -> RoutingCounts:
    """Return the sum of the routing counts of at least one text; all counts must be those of the same model."""
    all_counts = list(counts)

    def field_sum(name: str) -> Any:
        return np.sum([np.array(getattr(text_counts, name)) for text_counts in all_counts], axis=0).tolist()

    sums = {name: field_sum(name) for name in RoutingCounts.model_fields if name != "distinct"}
    # The tasks of a vision model may choose different numbers of experts per sub-token. Histograms for smaller numbers
    # are shorter than those for the largest one, so zeros are added at their end.
    histograms = [np.array(text_counts.distinct) for text_counts in all_counts]
    length = max(histogram.shape[1] for histogram in histograms)
    padded = [np.pad(histogram, ((0, 0), (0, length - histogram.shape[1]))) for histogram in histograms]
    return RoutingCounts(**sums, distinct=np.sum(padded, axis=0).tolist())


def routes_per_token(counts: RoutingCounts) -> float:
    """Return the mean number of routes of a token: h times k, or a mean of such products if k varies between texts."""
    return sum(counts.counts[0]) / max(1, counts.tokens)


def expert_loads(routes: RouteCounts) -> np.ndarray:
    """Return the load of each expert: its share of its layer's routes, times the number E of experts, shape (L, E).

    Under uniform routing, each load is 1.
    """
    return metrics.expert_loads(np.array(routes))


def load_entropy(counts: RoutingCounts) -> np.ndarray:
    """Return the entropy of each layer's distribution of routes over experts, shape (L,).

    It is divided by its maximum, so 1 means that all experts of the layer get the same number of routes.
    """
    return metrics.load_entropy(np.array(counts.counts))


def activated_shares(counts: RoutingCounts) -> list[float]:
    """Return the share of activated experts among the experts of all layers, for each of `THRESHOLDS`.

    An expert is activated if the share of tokens that select it is above the threshold.
    """
    # A text without tokens has only zeros in its counts. `max` then avoids the division of 0 by 0.
    selection_rates = np.array(counts.tokens_of) / max(1, counts.tokens)
    return [float((selection_rates > threshold).mean()) for threshold in THRESHOLDS]


def relative_activated_shares(routes: RouteCounts) -> list[float]:
    """Return the share of experts with a load above each of `RELATIVE_THRESHOLDS`, in units of a uniform load.

    The shares are over the experts of all layers. They are comparable between models with different numbers of experts
    or routes, unlike those of `activated_shares`.
    """
    return [float((expert_loads(routes) > threshold).mean()) for threshold in RELATIVE_THRESHOLDS]


def mean_distinct_experts(counts: RoutingCounts) -> np.ndarray:
    """Return the mean number of different experts that the sub-tokens of a token go to, by layer, shape (L,)."""
    histogram = np.array(counts.distinct, float)
    return np.asarray(histogram @ np.arange(histogram.shape[1]) / histogram.sum(1).clip(min=1))


def head_agreement(counts: RoutingCounts) -> np.ndarray:
    """Return the share of tokens for which the sub-tokens of two heads have the same first choice, shape (L, h, h)."""
    return np.asarray(np.array(counts.agreement, float) / max(1, counts.tokens))


def mean_head_agreement(counts: RoutingCounts) -> np.ndarray | None:
    """Return the mean of `head_agreement` over all pairs of different heads, by layer, shape (L,).

    It is None for a model with one head.
    """
    agreement = head_agreement(counts)
    heads = agreement.shape[1]
    if heads == 1:
        return None
    # Every head agrees with itself, so the diagonal adds up to the number of heads. It is subtracted, because only
    # pairs of different heads count.
    return np.asarray((agreement.sum((1, 2)) - heads) / (heads * (heads - 1)))


def first_choice_weight(counts: RoutingCounts) -> np.ndarray:
    """Return the mean gate (routing weight) of the first choices of all sub-tokens, by layer, shape (L,)."""
    return np.asarray(np.array(counts.first_weight) / max(1, counts.tokens * len(counts.agreement[0])))


def specialisation(text_counts: RoutingCounts, total_counts: RoutingCounts) -> float:
    """Return how much the experts that one text uses differ from those of all texts, from 0 to 1.

    The result is half the sum of the absolute differences between each expert's share of the one text's routes and its
    share of all texts' routes, averaged over layers. It is 0 if these shares are equal, and 1 if the experts are
    disjoint.
    """
    # A load is a share times the number E of experts, so dividing by E gives shares again.
    difference = (
        np.abs(expert_loads(text_counts.counts) - expert_loads(total_counts.counts)).sum(1)
        / len(total_counts.counts[0])
        / 2
    )
    return float(difference.mean())
