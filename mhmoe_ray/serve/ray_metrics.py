"""An engine's statistics as Ray metrics: each node exports those of all its replicas on the port that Prometheus
scrapes.

Names are those of `/metrics` with the prefix `ray_`; Ray adds the labels application, deployment and replica. Ray's own
histograms need every observation separately, so buckets are counters here, with the label `le`.
"""

import time
from collections.abc import Callable
from itertools import accumulate
from threading import Thread

from ray.serve.metrics import Counter, Gauge

from mhmoe_ray.serve.api.metrics import COUNTERS, EXPERTS, GAUGES, HISTOGRAMS
from mhmoe_ray.serve.engine import Stats
from mhmoe_ray.serve.engine.request import BOUNDS

SECONDS = 2.0
"""Seconds between two updates of the metrics."""


class RayMetrics:
    """The Ray metrics of one replica."""

    def __init__(self, model: str) -> None:
        """Create the metrics.

        Args:
            model: the model's name for clients.
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
        """Set the gauges, and add to each counter what has come since the last call."""
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
    """Update the metrics from an engine's statistics every SECONDS seconds, in a thread that lives as long as the
    process."""
    metrics = RayMetrics(model)

    def run() -> None:
        while True:
            metrics.tell(stats())
            time.sleep(SECONDS)

    Thread(target=run, name="metrics", daemon=True).start()
