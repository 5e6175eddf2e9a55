"""A run's numbers as Ray's metrics, which each node gives to Prometheus; they end with the workers that tell them."""

from threading import Event, Lock, Thread
from typing import Any

from ray.util.metrics import Gauge
from torch import Tensor

from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.metrics import (
    EXPERT_LOAD,
    LAYER_ENTROPY,
    PREFIX,
    RANK,
    RUN,
    SKIPPED_STEPS_TOTAL,
    STEPS,
    load,
    load_entropy,
)
from mhmoe_ray.train.telemetry.line import Waits

AGAIN_SECONDS = 5.0


class Gauges:
    """Of one rank. Ray forgets a value that is not told again for a while, and a step or the time between two
    validations may be longer: so a thread does that."""

    def __init__(self, run: str) -> None:
        """Args:
        run: its id, a label of all of them.
        """
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._over = Lock(), Event()
        self._thread = Thread(target=self._repeat, name="metrics", daemon=True)
        self._thread.start()

    def add(self, name: str, about: str, *labels: str) -> None:
        self._gauges[name] = Gauge(PREFIX + name, description=about, tag_keys=("run", *labels))

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
    for name, about in RANK.items():
        gauges.add(name, about, "rank")


def tell_rank(gauges: Gauges, rank: int, waits: Waits) -> None:
    for name, value in zip(RANK, waits, strict=True):
        gauges.set(name, value, rank=str(rank))


def add_run(gauges: Gauges, steps: int) -> None:
    """Args:
    gauges: of rank 0.
    steps: that the run is to have.
    """
    for name, about in RUN.items():
        gauges.add(name, about)
    gauges.add(*SKIPPED_STEPS_TOTAL)
    gauges.add(*LAYER_ENTROPY, "layer")
    gauges.add(*EXPERT_LOAD, "layer", "expert")
    gauges.add(*STEPS)
    gauges.set(STEPS[0], steps)


def tell_run(gauges: Gauges, line: dict[str, Any], count_LE: Tensor) -> None:
    """Args:
    gauges: of rank 0.
    line: of a step.
    count_LE: its routes per layer and expert.
    """
    for name in RUN:
        if line.get(name) is not None:
            gauges.set(name, line[name])
    gauges.set(SKIPPED_STEPS_TOTAL[0], line.get(metrics.SKIPPED_STEPS, 0))
    if not len(count_LE):  # a dense model
        return
    entropy_L, load_LE = load_entropy(count_LE.numpy()), load(count_LE.numpy())
    for layer, (entropy, loads) in enumerate(zip(entropy_L.tolist(), load_LE.tolist(), strict=True)):
        gauges.set(LAYER_ENTROPY[0], entropy, layer=str(layer))
        for expert, value in enumerate(loads):
            gauges.set(EXPERT_LOAD[0], value, layer=str(layer), expert=str(expert))
