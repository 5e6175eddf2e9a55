"""Metrics of a run as Ray's metrics, which each node exports to Prometheus; they end with the workers that report
them."""

from threading import Event, Lock, Thread
from typing import Any

from ray.util.metrics import Gauge
from torch import Tensor

from mhmoe_ray.runs.metrics import (
    DATA_WAIT,
    EXCHANGE_WAIT,
    EXPERT_LOAD,
    LAYER_ENTROPY,
    METRICS,
    PREFIX,
    STEPS,
    Metric,
    load,
    load_entropy,
)
from mhmoe_ray.train.telemetry.line import Waits

AGAIN_SECONDS = 5.0


class Gauges:
    """Gauges of one rank.

    Ray forgets a value that is not reported again for a while, and a step or the time between two validations may be
    longer. So a thread reports all values again every `AGAIN_SECONDS`.
    """

    def __init__(self, run: str) -> None:
        """Start the thread that reports all values again.

        Args:
            run: id of the run, a label of all gauges.
        """
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._over = Lock(), Event()
        self._thread = Thread(target=self._repeat, name="metrics", daemon=True)
        self._thread.start()

    def add(self, metric: Metric) -> None:
        labels = ("run", *metric.labels)
        self._gauges[metric.name] = Gauge(PREFIX + metric.name, description=metric.help, tag_keys=labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._values[name, (("run", self._run), *labels.items())] = value
            self._gauges[name].set(value, tags={"run": self._run, **labels})

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._over.wait(AGAIN_SECONDS):
            with self._lock:
                for (name, labels), value in self._values.items():
                    self._gauges[name].set(value, tags=dict(labels))


def add_rank(gauges: Gauges) -> None:
    """Add the gauges of metrics that every rank reports for itself."""
    for metric in _of_scope("rank"):
        gauges.add(metric)


def tell_rank(gauges: Gauges, rank: int, waits: Waits) -> None:
    for name, value in ((DATA_WAIT, waits.data), (EXCHANGE_WAIT, waits.exchange)):
        gauges.set(name, value, rank=str(rank))


def add_run(gauges: Gauges, steps: int) -> None:
    """Add the gauges of metrics of the whole run, and set the number of its steps.

    Args:
        gauges: gauges of rank 0.
        steps: number of steps that the run is to have.
    """
    for metric in _of_scope("run", "layer", "expert"):
        gauges.add(metric)
    gauges.set(STEPS, steps)


def tell_run(gauges: Gauges, line: dict[str, Any], count_LE: Tensor) -> None:
    """Report a step's metrics of the whole run, of each layer and of each expert.

    Args:
        gauges: gauges of rank 0.
        line: line of the step.
        count_LE: routes of the step per layer and expert; without layers for a dense model.
    """
    for metric in _of_scope("run"):
        value = line.get(metric.name)
        if (shown := metric.absent if value is None else value) is not None:
            gauges.set(metric.name, shown)
    if not len(count_LE):  # a dense model
        return
    entropy_L, load_LE = load_entropy(count_LE.numpy()), load(count_LE.numpy())
    for layer, (entropy, loads) in enumerate(zip(entropy_L.tolist(), load_LE.tolist(), strict=True)):
        gauges.set(LAYER_ENTROPY, entropy, layer=str(layer))
        for expert, value in enumerate(loads):
            gauges.set(EXPERT_LOAD, value, layer=str(layer), expert=str(expert))


def _of_scope(*scopes: str) -> list[Metric]:
    return [metric for metric in METRICS.values() if metric.scope in scopes]
