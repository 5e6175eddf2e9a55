"""A run's numbers as Ray's metrics, which each node gives to Prometheus; they end with the workers that tell them."""

from typing import Any

from ray.util.metrics import Gauge
from torch import Tensor

from mhmoe_ray.model.balance import load_entropy
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.exported import EXPERT_LOAD, LAYER_ENTROPY, PREFIX, RANK, RUN, SKIPPED_STEPS, STEPS
from mhmoe_ray.train.telemetry.line import Waits


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(PREFIX + name, description=text, tag_keys=("run", *labels))


class RankMetrics:
    def __init__(self, run: str, rank: int) -> None:
        self._labels = {"run": run, "rank": str(rank)}
        self._gauges = [_gauge(name, text, "rank") for name, text in RANK.items()]

    def tell(self, waits: Waits) -> None:
        for gauge, value in zip(self._gauges, waits, strict=True):
            gauge.set(value, tags=self._labels)


class RunMetrics:
    def __init__(self, run: str, steps: int) -> None:
        """Args:
        run: its id.
        steps: that it is to have.
        """
        self._labels = {"run": run}
        self._gauges = {name: _gauge(name, text) for name, text in RUN.items()}
        self._skipped = _gauge(*SKIPPED_STEPS)
        self._entropy, self._load = _gauge(*LAYER_ENTROPY, "layer"), _gauge(*EXPERT_LOAD, "layer", "expert")
        self._steps = _gauge(*STEPS)
        self._steps.set(steps, tags=self._labels)

    def tell(self, line: dict[str, Any], count_LE: Tensor) -> None:
        """Args:
        line: of a step.
        count_LE: its routes per layer and expert.
        """
        for name, gauge in self._gauges.items():
            if line.get(name) is not None:
                gauge.set(line[name], tags=self._labels)
        self._skipped.set(line.get(metrics.SKIPPED_STEPS, 0), tags=self._labels)
        share_LE = count_LE / count_LE.sum(1, keepdim=True).clamp(min=1) * count_LE.shape[1]
        for layer, (entropy, shares) in enumerate(zip(load_entropy(count_LE).tolist(), share_LE.tolist(), strict=True)):
            place = self._labels | {"layer": str(layer)}
            self._entropy.set(entropy, tags=place)
            for expert, share in enumerate(shares):
                self._load.set(share, tags=place | {"expert": str(expert)})
