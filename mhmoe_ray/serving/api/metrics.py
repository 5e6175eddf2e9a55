"""An engine's statistics in Prometheus' format, and the names and help texts of its metrics."""

from collections.abc import Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mhmoe_ray.serving.engine import Stats
from mhmoe_ray.serving.engine.request import BUCKET_BOUNDS, Histogram

# The keys of `GAUGES`, `COUNTERS` and `HISTOGRAMS` are names of fields of `Stats`.
GAUGES = {
    "waiting": "Requests that wait.",
    "running": "Requests that are computed.",
    "cache_used": "Share of the cache's blocks that requests hold.",
}
COUNTERS = {
    "requests": "Requests that ended.",
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts whose keys and values were in the cache.",
    "answer_tokens": "Tokens of answers.",
    "steps": "Steps of the engine.",
    "step_tokens": "Tokens that the steps computed; divided by the steps, the mean batch size.",
}
HISTOGRAMS = {
    "queue": "Seconds from a request's arrival to its first step.",
    "first_token": "Seconds from a request's arrival to its first token.",
    "each_token": "Seconds between two tokens of an answer.",
}
EXPERT_ROUTES = "Routes of served tokens, by layer and expert."


def render_exposition(stats: Stats, labels: Mapping[str, str]) -> bytes:
    """Return the statistics as the text of `/metrics`; every metric gets the labels."""
    return generate_latest(_Collector(stats, labels))


class _Collector(Collector):
    """Prometheus collector that turns the statistics of one engine into metrics."""

    def __init__(self, stats: Stats, labels: Mapping[str, str]) -> None:
        self._stats, self._names, self._values = stats, list(labels), list(labels.values())

    def collect(self) -> Iterator[Metric]:
        for name, help_ in GAUGES.items():
            gauge = GaugeMetricFamily(f"mhmoe_{name}", help_, labels=self._names)
            gauge.add_metric(self._values, getattr(self._stats, name))
            yield gauge
        for name, help_ in COUNTERS.items():
            counter = CounterMetricFamily(f"mhmoe_{name}", help_, labels=self._names)
            counter.add_metric(self._values, getattr(self._stats, name))
            yield counter
        for name, help_ in HISTOGRAMS.items():
            durations: Histogram = getattr(self._stats, name)
            histogram = HistogramMetricFamily(f"mhmoe_{name}_seconds", help_, labels=self._names)
            # A bucket of Prometheus counts all durations up to its bound, while `Histogram` counts those between two
            # bounds, so the counts are added up.
            bounds, cumulative_count = [*map(str, BUCKET_BOUNDS), "+Inf"], 0
            buckets = []
            for bound, count in zip(bounds, durations.counts, strict=True):
                cumulative_count += count
                buckets.append((bound, cumulative_count))
            histogram.add_metric(self._values, buckets, durations.total)
            yield histogram
        experts = CounterMetricFamily("mhmoe_expert_routes", EXPERT_ROUTES, labels=[*self._names, "layer", "expert"])
        for layer, counts in enumerate(self._stats.count_LE):
            for expert, count in enumerate(counts):
                experts.add_metric([*self._values, str(layer), str(expert)], count)
        yield experts
