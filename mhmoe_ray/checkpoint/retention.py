"""Which checkpoints of a run stay, where not all do."""

import math

from mhmoe_ray.checkpoint.manifest import MANIFEST, committed, step_and_group
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, remove_tree


class Retention:
    """The newest ones stay, and the best: the one of the lowest validation loss among those of a step that was
    validated. A loss that is not finite is none.

    The run's history, which may be long, is read once; what comes after that is told.
    """

    def __init__(self, run: RunDir, keep: int) -> None:
        """Args:
        run: that they are of.
        keep: how many are the newest.
        """
        self._run, self._keep = run, keep
        self._losses: dict[int, float] | None = None
        """By the steps that were validated."""

    def surplus(self, step: int, loss: float | None) -> list[Location]:
        """Those that do not stay, oldest first.

        Args:
            step: of the newest.
            loss: of its validation, if there was one.
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
    """Its manifest goes first: should the rest stay, for whatever reason, it no longer counts."""
    (checkpoint / MANIFEST).unlink()
    remove_tree(checkpoint)
