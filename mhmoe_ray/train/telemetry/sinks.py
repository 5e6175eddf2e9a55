"""All places that hear of a run's steps."""

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
    """Of one rank; what concerns the whole run, rank 0 tells."""

    def __init__(self, run: RunDir, spec: RunSpec, rank: int, group: int, start: int) -> None:
        """Args:
        run, spec: what it tells of.
        rank: of this process.
        group: which start of workers it belongs to.
        start: the step that it goes on from.
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
        """Args:
        line: of a step, for the whole run.
        count_LE: its routes per layer and expert, for the whole run.
        waits: of this rank.
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
        """Return when all of it can be read."""
        history.flush(self._run)
        if self._board:
            self._board.flush()

    def close(self, end: End) -> None:
        """Args:
        end: how the training ended.
        """
        self._gauges.close()
        if self._board:
            self._board.close()
        if self._mlflow:
            self._mlflow.close(end)
