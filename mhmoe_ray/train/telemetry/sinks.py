"""Sinks, which receive the metrics of a run: metrics.jsonl, Ray's metrics, TensorBoard and MLflow."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.telemetry import mlflow, tensorboard
from mhmoe_ray.train.telemetry.line import WaitShares
from mhmoe_ray.train.telemetry.ray_metrics import Gauges, report_rank, report_run
from mhmoe_ray.train.telemetry.tracker import EndStatus, Tracker

OpenTracker = Callable[[RunDir, RunSpec, int, int], Tracker | None]
"""Function (run, spec, number of the worker group, step it continues from) that opens a tracker; it returns None if the
spec does not ask for the tracker."""
TRACKERS: tuple[OpenTracker, ...] = (tensorboard.open_tracker, mlflow.open_tracker)


class Telemetry:
    """Telemetry of one rank: its sinks for metrics; rank 0 also reports the metrics of the whole run."""

    def __init__(self, run: RunDir, spec: RunSpec, rank: int, group: int, start: int) -> None:
        self._run, self._rank = run, rank
        self._reports_run = rank == 0
        self._gauges = Gauges(run.id)
        self._trackers: list[Tracker] = []
        if self._reports_run:
            self._gauges.set(metrics.STEPS, spec.train.steps)
            trackers = (open_tracker(run, spec, group, start) for open_tracker in TRACKERS)
            self._trackers = [tracker for tracker in trackers if tracker is not None]

    def report(self, line: dict[str, Any], count_LE: Tensor, waits: WaitShares) -> None:
        """Report this rank's waits in a step and, on rank 0, the metrics in `line` and `count_LE`, which are over all
        ranks."""
        report_rank(self._gauges, self._rank, waits)
        if self._reports_run:
            history.append(self._run, line)
            report_run(self._gauges, line, count_LE)
        for tracker in self._trackers:
            tracker.report(line)

    def flush(self) -> None:
        """Write all reported metrics to metrics.jsonl and to TensorBoard's event files."""
        history.flush(self._run)
        for tracker in self._trackers:
            tracker.flush()

    def close(self, end_status: EndStatus) -> None:
        """Close all sinks of this rank; MLflow shows `end_status`."""
        self._gauges.close()
        for tracker in self._trackers:
            tracker.close(end_status)
