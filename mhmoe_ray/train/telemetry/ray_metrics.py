"""Metrics of a run in Ray, which each node exports to Prometheus until the workers that report them end."""

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
    SLOWDOWN,
    Metric,
    expert_loads,
    load_entropy,
)
from mhmoe_ray.train.telemetry.line import RankTimes

REPEAT_SECONDS = 5.0


class Gauges:
    """Ray gauges with which a rank reports metrics, and a thread that repeats all values every `REPEAT_SECONDS`."""

    # Ray drops a value that is not reported again for a while. A step, or the time to the next validation, may take
    # longer than that, so a thread repeats all values.

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._stop_event = Lock(), Event()
        self._thread = Thread(target=self._repeat, name="metrics", daemon=True)
        self._thread.start()

    def set(self, name: str, value: float, **labels: str) -> None:
        """Report a value of a metric; `labels` are all its labels but `run`."""
        with self._lock:
            if name not in self._gauges:
                metric = METRICS[name]
                self._gauges[name] = Gauge(PREFIX + name, metric.help, tag_keys=("run", *metric.labels))
            self._values[name, (("run", self._run), *labels.items())] = value
            self._gauges[name].set(value, tags={"run": self._run, **labels})

    def close(self) -> None:
        self._stop_event.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._stop_event.wait(REPEAT_SECONDS):
            with self._lock:
                for (name, labels), value in self._values.items():
                    self._gauges[name].set(value, tags=dict(labels))


def report_rank(gauges: Gauges, rank: int, rank_times: RankTimes) -> None:
    """Report the times of a rank in a step."""
    for name, value in zip((DATA_WAIT, EXCHANGE_WAIT, SLOWDOWN), rank_times, strict=True):
        gauges.set(name, value, rank=str(rank))


def report_run(gauges: Gauges, line: dict[str, Any], count_LE: Tensor) -> None:
    """Report a step's metrics of the whole run (`step_line`), and of each part, layer and expert. `count_LE` has no
    layers for a dense model."""
    for metric in _metrics_of_scope("run"):
        value = line.get(metric.name)
        if (gauge_value := metric.absent if value is None else value) is not None:
            gauges.set(metric.name, gauge_value)
    for metric in _metrics_of_scope("part"):
        for part, value in line.get(metric.name, {}).items():
            gauges.set(metric.name, value, part=part)
    # A dense model has no experts to report.
    if not len(count_LE):
        return
    entropy_L, load_LE = load_entropy(count_LE.numpy()), expert_loads(count_LE.numpy())
    for layer, (entropy, loads) in enumerate(zip(entropy_L.tolist(), load_LE.tolist(), strict=True)):
        gauges.set(LAYER_ENTROPY, entropy, layer=str(layer))
        for expert, value in enumerate(loads):
            gauges.set(EXPERT_LOAD, value, layer=str(layer), expert=str(expert))


def _metrics_of_scope(scope: str) -> list[Metric]:
    return [metric for metric in METRICS.values() if metric.scope == scope]
