"""Sinks, which receive the metrics of a run: metrics.jsonl, Ray's metrics, TensorBoard and MLflow."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mhmoe_ray.runs import history
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.telemetry import mlflow, tensorboard
from mhmoe_ray.train.telemetry.line import WaitShares
from mhmoe_ray.train.telemetry.ray_metrics import Gauges, add_rank, add_run, report_rank, report_run
from mhmoe_ray.train.telemetry.tracker import EndStatus, Tracker

OpenTracker = Callable[[RunDir, RunSpec, int, int], Tracker | None]
"""Function that opens the tracker of a run, given its spec, the number of the worker group and the step from which that
group continues; it returns None if the spec does not ask for the tracker."""
TRACKERS: tuple[OpenTracker, ...] = (tensorboard.open_tracker, mlflow.open_tracker)
"""Functions that open the trackers: the sinks beside metrics.jsonl and Ray's metrics."""


class Telemetry:
    """Telemetry of one rank: its sinks for metrics; rank 0 also reports the metrics of the whole run."""

    def __init__(self, run: RunDir, spec: RunSpec, rank: int, group: int, start: int) -> None:
        """Open all sinks of this rank.

        Args:
            run: run directory.
            spec: spec of the run.
            rank: rank of this process.
            group: number of the worker group that the rank belongs to.
            start: step from which the worker group continues.
        """
        self._run, self._rank = run, rank
        self._reports_run = rank == 0
        self._gauges = Gauges(run.id)
        add_rank(self._gauges)
        self._trackers: list[Tracker] = []
        if self._reports_run:
            add_run(self._gauges, spec.train.steps)
            trackers = (open_tracker(run, spec, group, start) for open_tracker in TRACKERS)
            self._trackers = [tracker for tracker in trackers if tracker is not None]

    def report(self, line: dict[str, Any], count_LE: Tensor, waits: WaitShares) -> None:
        """Report the metrics of a step: this rank's waiting times and, on rank 0, the metrics of the whole run.

        Args:
            line: metrics of the step over all ranks (`step_line`).
            count_LE: number of the step's routes to each expert of each layer, over all ranks.
            waits: shares of the step's time that this rank waited.
        """
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
        """Close all sinks of this rank.

        Args:
            end_status: final status of the training, which MLflow shows.
        """
        self._gauges.close()
        for tracker in self._trackers:
            tracker.close(end_status)
