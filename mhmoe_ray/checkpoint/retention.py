"""Checkpoint retention: which checkpoints of a run are kept, where not all are."""

import math

from mhmoe_ray.checkpoint.manifest import MANIFEST, committed, step_and_group
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, remove_tree


class Retention:
    """Retention policy that keeps the newest checkpoints and the best one.

    The best checkpoint has the lowest validation loss among those of steps that were validated. A loss that is not
    finite does not count. The run's history, which may be long, is read once; later losses are passed to `surplus`.
    """

    def __init__(self, run: RunDir, keep: int) -> None:
        """Prepare the policy; the history is not read yet.

        Args:
            run: the run whose checkpoints are kept or dropped.
            keep: number of newest checkpoints to keep.
        """
        self._run, self._keep = run, keep
        self._losses: dict[int, float] | None = None
        """Validation loss by step; None until the history is read."""

    def surplus(self, step: int, loss: float | None) -> list[Location]:
        """Return the checkpoints that are not to be kept, oldest first.

        Args:
            step: step of the newest checkpoint.
            loss: validation loss of that step, None if it was not validated.
        """
        if self._losses is None:
            validated_at = ((line[metrics.STEP], line.get(metrics.VAL_LOSS)) for line in history.read(self._run))
            self._losses = {step: loss for step, loss in validated_at if loss is not None}
        if loss is not None and math.isfinite(loss):
            self._losses[step] = loss
        found, losses = committed(self._run), self._losses
        validated = [path for path in found if step_and_group(path)[0] in losses]
        # Of two of a step the later is the one whose loss the history has.
        best = min(reversed(validated), key=lambda path: losses[step_and_group(path)[0]], default=None)
        return [path for path in found[: -self._keep] if path != best]


def drop(checkpoint: Location) -> None:
    """Drop a checkpoint, its manifest first: if the removal of the rest fails for any reason, it no longer counts."""
    (checkpoint / MANIFEST).unlink()
    remove_tree(checkpoint)
