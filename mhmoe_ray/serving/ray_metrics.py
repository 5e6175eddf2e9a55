"""An engine's statistics as Ray metrics, which each node exports for all its replicas on the port for Prometheus.

The names are those of `/metrics` with the prefix `ray_`, and Ray adds the labels application, deployment and replica.
Ray's own histograms need every observation, so buckets are counters with the label `le`.
"""

import time
from collections.abc import Callable
from itertools import accumulate
from threading import Thread

from ray.serve.metrics import Counter, Gauge

from mhmoe_ray.serving.api.metrics import COUNTERS, EXPERT_ROUTES, GAUGES, HISTOGRAMS
from mhmoe_ray.serving.engine import Stats
from mhmoe_ray.serving.engine.request import BUCKET_BOUNDS

EXPORT_SECONDS = 2.0


class RayMetrics:
    """Exporter that publishes the statistics of one replica's engine as Ray metrics."""

    def __init__(self, model: str) -> None:
        self._labels = {"model": model}
        self._gauges = {name: self._create_metric(Gauge, name, text) for name, text in GAUGES.items()}
        self._counters = {name: self._create_metric(Counter, name, text) for name, text in COUNTERS.items()}
        self._buckets = {
            name: self._create_metric(Counter, f"{name}_seconds_bucket", f"{text} By bucket.", "le")
            for name, text in HISTOGRAMS.items()
        }
        self._sums = {
            name: self._create_metric(Counter, f"{name}_seconds_sum", text) for name, text in HISTOGRAMS.items()
        }
        self._experts = self._create_metric(Counter, "expert_routes", EXPERT_ROUTES, "layer", "expert")
        self._exported_values: dict[tuple[str, ...], float] = {}

    def _create_metric(self, kind: type[Counter] | type[Gauge], name: str, text: str, *labels: str) -> Counter | Gauge:
        """Return a new metric with the label `model` and further labels."""
        return kind(f"mhmoe_{name}", description=text, tag_keys=("model", *labels))

    def export(self, stats: Stats) -> None:
        """Set the gauges to the values in `stats`, and add to each counter its increase since the last call."""
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name), tags=self._labels)
        for name, counter in self._counters.items():
            self._add_to_counter(counter, getattr(stats, name), {}, name)
        for name in HISTOGRAMS:
            histogram = getattr(stats, name)
            self._add_to_counter(self._sums[name], histogram.total, {}, name, "sum")
            for bound, cumulative_count in zip(
                (*map(str, BUCKET_BOUNDS), "+Inf"), accumulate(histogram.counts), strict=True
            ):
                self._add_to_counter(self._buckets[name], cumulative_count, {"le": bound}, name, bound)
        for layer, counts in enumerate(stats.count_LE):
            for expert, count in enumerate(counts):
                expert_labels = {"layer": str(layer), "expert": str(expert)}
                self._add_to_counter(self._experts, count, expert_labels, "experts", *expert_labels.values())

    def _add_to_counter(self, counter: Counter, value: float, labels: dict[str, str], *key: str) -> None:
        """Add to a counter the increase of its total `value`; `key` is that of the series in `_exported_values`."""
        # Ray's counters take increases, while the engine's statistics are totals, so the total of the last export is
        # stored.
        increase = value - self._exported_values.get(key, 0)
        if increase > 0:
            counter.inc(increase, tags=self._labels | labels)
            self._exported_values[key] = value


def export_periodically(stats: Callable[[], Stats], model: str) -> None:
    """Export an engine's statistics every `EXPORT_SECONDS` seconds, in a thread that lives as long as the process."""
    metrics = RayMetrics(model)

    def run() -> None:
        while True:
            metrics.export(stats())
            time.sleep(EXPORT_SECONDS)

    Thread(target=run, name="metrics", daemon=True).start()
