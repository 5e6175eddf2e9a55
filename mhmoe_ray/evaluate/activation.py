"""Statistics on a model's use of its experts, computed from counts of routes.

Arrays have L mixture-of-experts layers, E experts per layer and h heads. A token with two sub-tokens at the same expert
selects it once; an expert is activated if the share of tokens that select it is above a threshold.
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
"""Thresholds of an expert's load, in units of its load under uniform routing."""

RouteCounts = Sequence[Sequence[int]]
"""Number of routes to each expert of each layer, L x E."""


def sum_counts(counts: Iterable[RoutingCounts]) -> RoutingCounts:
    """Return the sum of the routing counts of at least one text of the same model."""
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
    """Return the mean number of routes of a token: h times k, or a mean if k varies between texts."""
    return sum(counts.counts[0]) / max(1, counts.tokens)


def expert_loads(routes: RouteCounts) -> np.ndarray:
    """Return each expert's share of its layer's routes times E, shape (L, E); uniform routing gives 1."""
    return metrics.expert_loads(np.array(routes))


def load_entropy(counts: RoutingCounts) -> np.ndarray:
    """Return the entropy of each layer's distribution of routes, divided by its maximum, shape (L,)."""
    return metrics.load_entropy(np.array(counts.counts))


def activated_shares(counts: RoutingCounts) -> list[float]:
    """Return the share of activated experts of all layers, for each of `THRESHOLDS`."""
    # A text without tokens has only zeros in its counts. `max` then avoids the division of 0 by 0.
    selection_rates = np.array(counts.tokens_of) / max(1, counts.tokens)
    return [float((selection_rates > threshold).mean()) for threshold in THRESHOLDS]


def relative_activated_shares(routes: RouteCounts) -> list[float]:
    """Return the share of experts of all layers with a load above each of `RELATIVE_THRESHOLDS`.

    It is comparable between models with different E, h or k, unlike `activated_shares`.
    """
    return [float((expert_loads(routes) > threshold).mean()) for threshold in RELATIVE_THRESHOLDS]


def mean_distinct_experts(counts: RoutingCounts) -> np.ndarray:
    """Return the mean number of different experts of a token, by layer, shape (L,)."""
    histogram = np.array(counts.distinct, float)
    return np.asarray(histogram @ np.arange(histogram.shape[1]) / histogram.sum(1).clip(min=1))


def head_agreement(counts: RoutingCounts) -> np.ndarray:
    """Return the share of tokens whose sub-tokens of two heads have the same first choice, shape (L, h, h)."""
    return np.asarray(np.array(counts.agreement, float) / max(1, counts.tokens))


def mean_head_agreement(counts: RoutingCounts) -> np.ndarray | None:
    """Return the mean of `head_agreement` over pairs of different heads, shape (L,); None with one head."""
    agreement = head_agreement(counts)
    heads = agreement.shape[1]
    if heads == 1:
        return None
    # Every head agrees with itself, so the diagonal adds up to the number of heads. It is subtracted, because only
    # pairs of different heads count.
    return np.asarray((agreement.sum((1, 2)) - heads) / (heads * (heads - 1)))


def first_choice_weight(counts: RoutingCounts) -> np.ndarray:
    """Return the mean gate of all first choices, by layer, shape (L,)."""
    return np.asarray(np.array(counts.first_weight) / max(1, counts.tokens * len(counts.agreement[0])))


def specialisation(text_counts: RoutingCounts, total_counts: RoutingCounts) -> float:
    """Return half the sum of the absolute differences of the experts' shares of routes, averaged over layers.

    It is 0 if one text uses the experts like all texts, and 1 if the experts are disjoint.
    """
    # A load is a share times the number E of experts, so dividing by E gives shares again.
    difference = (
        np.abs(expert_loads(text_counts.counts) - expert_loads(total_counts.counts)).sum(1)
        / len(total_counts.counts[0])
        / 2
    )
    return float(difference.mean())
