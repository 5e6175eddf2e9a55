"""An engine's metrics, in Prometheus' format and as Ray's metrics.

Names are those of `/metrics` with `ray_` before them; Ray labels them with application, deployment and replica. Ray's
own histograms want every observation by itself, so buckets are counters here, with the label `le`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from threading import Thread

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from ray.serve.metrics import Counter, Gauge

from mhmoe_ray.serve.engine import Stats
from mhmoe_ray.serve.engine.request import BOUNDS, Histogram

GAUGES = {
    "waiting": "Requests that wait.",
    "running": "Requests that are computed.",
    "cache_used": "Share of the cache's blocks that requests hold.",
}
COUNTERS = {
    "requests": "Requests that ended.",
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Of them, those whose keys and values were in the cache.",
    "answer_tokens": "Tokens of answers.",
    "steps": "Steps of the engine.",
    "step_tokens": "Tokens that these computed: over the steps, the mean batch.",
}
HISTOGRAMS = {
    "queue": "Seconds from a request's arrival to its first step.",
    "first_token": "Seconds from a request's arrival to its first token.",
    "each_token": "Seconds between two tokens of an answer.",
}
EXPERTS = "Routes of served tokens, by layer and expert."


def exposition(stats: Stats, labels: Mapping[str, str]) -> bytes:
    """Args:
    stats: of the engine.
    labels: of every series.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(stats, labels))
    return generate_latest(registry)


class _Collector(Collector):
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
            found: Histogram = getattr(self._stats, name)
            histogram = HistogramMetricFamily(f"mhmoe_{name}_seconds", help_, labels=self._names)
            bounds, below = [*map(str, BOUNDS), "+Inf"], 0
            buckets = []
            for bound, count in zip(bounds, found.counts, strict=True):
                below += count
                buckets.append((bound, below))
            histogram.add_metric(self._values, buckets, found.total)
            yield histogram
        experts = CounterMetricFamily("mhmoe_expert_routes", EXPERTS, labels=[*self._names, "layer", "expert"])
        for layer, counts in enumerate(self._stats.count_LE):
            for expert, count in enumerate(counts):
                experts.add_metric([*self._values, str(layer), str(expert)], count)
        yield experts


SECONDS = 2.0
"""Between two readings."""


class RayMetrics:
    """Of one replica."""

    def __init__(self, model: str) -> None:
        """Args:
        model: its name for clients.
        """
        self._labels = {"model": model}
        self._gauges = {name: self._made(Gauge, name, text) for name, text in GAUGES.items()}
        self._counters = {name: self._made(Counter, name, text) for name, text in COUNTERS.items()}
        self._buckets = {
            name: self._made(Counter, f"{name}_seconds_bucket", f"{text} By bucket.", "le")
            for name, text in HISTOGRAMS.items()
        }
        self._sums = {name: self._made(Counter, f"{name}_seconds_sum", text) for name, text in HISTOGRAMS.items()}
        self._experts = self._made(Counter, "expert_routes", EXPERTS, "layer", "expert")
        self._told: dict[tuple[str, ...], float] = {}

    def _made(self, kind: type[Counter] | type[Gauge], name: str, text: str, *labels: str) -> Counter | Gauge:
        return kind(f"mhmoe_{name}", description=text, tag_keys=("model", *labels))

    def tell(self, stats: Stats) -> None:
        """What has come since the last time."""
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name), tags=self._labels)
        for name, counter in self._counters.items():
            self._add(counter, getattr(stats, name), {}, name)
        for name in HISTOGRAMS:
            found = getattr(stats, name)
            self._add(self._sums[name], found.total, {}, name, "sum")
            for bound, below in zip((*map(str, BOUNDS), "+Inf"), accumulate(found.counts), strict=True):
                self._add(self._buckets[name], below, {"le": bound}, name, bound)
        for layer, counts in enumerate(stats.count_LE):
            for expert, count in enumerate(counts):
                place = {"layer": str(layer), "expert": str(expert)}
                self._add(self._experts, count, place, "experts", *place.values())

    def _add(self, counter: Counter, value: float, labels: dict[str, str], *key: str) -> None:
        more = value - self._told.get(key, 0)
        if more > 0:
            counter.inc(more, tags=self._labels | labels)
            self._told[key] = value


def follow(stats: Callable[[], Stats], model: str) -> None:
    """Tell an engine's stats every few seconds, for as long as this process lives."""
    metrics = RayMetrics(model)

    def run() -> None:
        while True:
            metrics.tell(stats())
            time.sleep(SECONDS)

    Thread(target=run, name="metrics", daemon=True).start()
