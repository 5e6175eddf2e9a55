"""Checkpoint retention: keep the newest checkpoints of a run, the best one and those in use; delete the others."""

import math

from mhmoe_ray.checkpoint.manifest import MANIFEST, committed_checkpoints, step_and_group
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, remove_tree, sync


class RetentionPolicy:
    """Retention policy of a run: it keeps the newest checkpoints, the best one and those in use.

    The best checkpoint has the lowest validation loss; one without a validation, or with a loss that is not finite,
    cannot be the best. `events.checkpoints_in_use` says which checkpoints applications and batch inferences use.
    """

    def __init__(self, run: RunDir, newest_count: int, base: str | None = None) -> None:
        """Keep `newest_count` checkpoints, and that with the name `base`, which the adapter of all others needs."""
        self._run, self._newest_count, self._base = run, newest_count, base
        self._losses: dict[int, float] | None = None
        """Validation loss by step; None until the run's history is first needed and read."""

    def removable_checkpoints(self, step: int, loss: float | None) -> list[Location]:
        """Return the committed checkpoints that the policy does not keep, oldest first.

        `loss` is the validation loss of `step`, the newest checkpoint's step; None without a validation.
        """
        # The run's history of metrics may be long, so it is read once. Later losses are arguments of this method.
        if self._losses is None:
            step_losses = ((line[metrics.STEP], line.get(metrics.VAL_LOSS)) for line in history.read(self._run))
            self._losses = {step: loss for step, loss in step_losses if loss is not None}
        if loss is not None and math.isfinite(loss):
            self._losses[step] = loss
        checkpoints, losses = committed_checkpoints(self._run), self._losses
        validated_checkpoints = [path for path in checkpoints if step_and_group(path)[0] in losses]
        # If two checkpoints are of the same step, the history has the loss of the later one. So the order is reversed,
        # and `min` returns the later one.
        best_checkpoint = min(
            reversed(validated_checkpoints), key=lambda path: losses[step_and_group(path)[0]], default=None
        )
        # A replica of an application or a worker of a batch inference may start again at any time, and then loads the
        # checkpoint again.
        names_in_use = events.checkpoints_in_use(events.read(self._run))
        return [
            path
            for path in checkpoints[: -self._newest_count]
            if path != best_checkpoint and path.name not in {*names_in_use, self._base}
        ]


def delete_checkpoint(checkpoint: Location) -> None:
    """Delete a committed checkpoint, its manifest first."""
    # Without its manifest the checkpoint is ignored, even if the other files are not removed.
    (checkpoint / MANIFEST).unlink()
    sync(checkpoint)
    remove_tree(checkpoint)
