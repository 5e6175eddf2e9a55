"""All places that a run's metrics are sent to."""

from typing import Any

from torch import Tensor

from mhmoe_ray.runs import history
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.telemetry.line import Waits
from mhmoe_ray.train.telemetry.mlflow import End, MlflowRun
from mhmoe_ray.train.telemetry.ray_metrics import Gauges, add_rank, add_run, tell_rank, tell_run
from mhmoe_ray.train.telemetry.tensorboard import TensorBoard


class Telemetry:
    """Metrics of one rank; rank 0 also reports what concerns the whole run."""

    def __init__(self, run: RunDir, spec: RunSpec, rank: int, group: int, start: int) -> None:
        """Open all places that this rank sends metrics to.

        Args:
            run: the run.
            spec: spec of the run.
            rank: rank of this process.
            group: number of the worker group that the rank belongs to.
            start: step that the worker group continues from.
        """
        self._run, self._rank = run, rank
        self._tells_run = rank == 0
        self._gauges = Gauges(run.id)
        add_rank(self._gauges)
        self._board, self._mlflow = None, None
        if self._tells_run:
            add_run(self._gauges, spec.train.steps)
            self._board = TensorBoard(run, group, start)
            self._mlflow = MlflowRun(run, spec) if spec.tracking.mlflow else None

    def tell(self, line: dict[str, Any], count_LE: Tensor, waits: Waits) -> None:
        """Report a step.

        Args:
            line: line of the step, for the whole run.
            count_LE: routes of the step per layer and expert, for the whole run.
            waits: waits of this rank.
        """
        tell_rank(self._gauges, self._rank, waits)
        if self._tells_run:
            history.append(self._run, line)
            tell_run(self._gauges, line, count_LE)
        if self._board:
            self._board.tell(line)
        if self._mlflow:
            self._mlflow.tell(line)

    def flush(self) -> None:
        """Return when all that was reported can be read from metrics.jsonl and from the event files."""
        history.flush(self._run)
        if self._board:
            self._board.flush()

    def close(self, end: End) -> None:
        """Close all places that this rank sends metrics to.

        Args:
            end: how the training ended.
        """
        self._gauges.close()
        if self._board:
            self._board.close()
        if self._mlflow:
            self._mlflow.close(end)
