"""Sinks, which receive the metrics of a run: metrics.jsonl, Ray's metrics and the trackers."""

from typing import Any

from torch import Tensor

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import expert_loads
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location
from mhmoe_ray.train.telemetry.line import RankTimes
from mhmoe_ray.train.telemetry.ray_metrics import Gauges, report_rank, report_run
from mhmoe_ray.train.telemetry.servers import open_servers
from mhmoe_ray.train.telemetry.tensorboard import TensorBoard
from mhmoe_ray.train.telemetry.tracker import EndStatus, QueuedTracker, Tracker


class Telemetry:
    """Telemetry of one rank: its sinks for metrics; rank 0 also reports the metrics of the whole run."""

    def __init__(self, run: RunDir, spec: RunSpec, rank: int, group: int, start: int) -> None:
        self._run, self._rank = run, rank
        self._reports_run = rank == 0
        self._gauges = Gauges(run.id)
        self._trackers: list[Tracker] = []
        if self._reports_run:
            self._gauges.set(metrics.STEPS, spec.train.steps)
            queues = [QueuedTracker(server, run, start) for server in open_servers(run, spec)]
            self._trackers = [TensorBoard(run, group, start), *queues]

    def report(self, line: dict[str, Any], count_LE: Tensor, rank_times: RankTimes) -> None:
        """Report this rank's times in a step and, on rank 0, the metrics in `line` and `count_LE`, which are over all
        ranks."""
        report_rank(self._gauges, self._rank, rank_times)
        if self._reports_run:
            history.append(self._run, line)
            report_run(self._gauges, line, count_LE)
        for tracker in self._trackers:
            tracker.report(line, expert_loads(count_LE.numpy()) if count_LE.numel() else None)

    def report_checkpoint(self, checkpoint: Location) -> None:
        """Show the folder of a new checkpoint in the trackers."""
        for tracker in self._trackers:
            tracker.report_checkpoint(checkpoint)

    def flush(self) -> None:
        """Write all reported metrics to metrics.jsonl and to TensorBoard's event files."""
        history.flush(self._run)
        for tracker in self._trackers:
            tracker.flush()

    def close(self, end_status: EndStatus) -> None:
        """Close all sinks of this rank; trackers show `end_status`."""
        self._gauges.close()
        for tracker in self._trackers:
            tracker.close(end_status)
