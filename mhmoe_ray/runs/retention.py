"""Which checkpoints of a run stay, where not all do."""

from mhmoe_ray.location import Location
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.files import remove_tree
from mhmoe_ray.runs.jsonl import Tail
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.manifest import MANIFEST, committed, step_and_group


class Retention:
    """The newest ones stay, and the best: the one of the lowest validation loss among those of a step that was
    validated. A loss that is not finite is none.

    It reads the run's history once and then what is added, as it is asked after each checkpoint of a long run.
    """

    def __init__(self, run: RunDir, keep: int) -> None:
        """Args:
        run: that they are of.
        keep: how many are the newest.
        """
        self._run, self._keep = run, keep
        self._added = Tail(run.metrics_file)
        self._losses: list[tuple[int, float]] = []
        """Steps that were validated, ascending."""

    def surplus(self) -> list[Location]:
        """Those that do not stay, oldest first."""
        for line in self._added.new():
            step, loss = line[metrics.STEP], line.get(metrics.VAL_LOSS)
            while self._losses and self._losses[-1][0] >= step:  # a restart repeats steps
                self._losses.pop()
            if loss is not None:
                self._losses.append((step, loss))
        found, losses = committed(self._run), dict(self._losses)
        validated = [path for path in found if step_and_group(path)[0] in losses]
        # Of two of a step the later is the one whose loss the history has.
        best = min(reversed(validated), key=lambda path: losses[step_and_group(path)[0]], default=None)
        return [path for path in found[: -self._keep] if path != best]


def drop(checkpoint: Location) -> None:
    """Its manifest goes first: should the rest stay, for whatever reason, it no longer counts."""
    (checkpoint / MANIFEST).unlink()
    remove_tree(checkpoint)
