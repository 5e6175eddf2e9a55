"""Which checkpoints of a run stay, where not all do."""

from mhmoe_ray.location import Location
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.files import remove_tree
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.manifest import MANIFEST, committed, step_and_group


def surplus(run: RunDir, keep: int) -> list[Location]:
    """All but the newest `keep` and the best, oldest first.

    The best is the one of the lowest validation loss among those of a step that was validated; a loss that is not
    finite is none.
    """
    found = committed(run)
    validated_at = (line for line in metrics.history(run) if line.get(metrics.VAL_LOSS) is not None)
    losses = {line[metrics.STEP]: line[metrics.VAL_LOSS] for line in validated_at}
    validated = [path for path in found if step_and_group(path)[0] in losses]
    best = min(validated, key=lambda path: losses[step_and_group(path)[0]], default=None)
    return [path for path in found[:-keep] if path != best]


def drop(checkpoint: Location) -> None:
    """Its manifest goes first: should the rest stay, for whatever reason, it no longer counts."""
    (checkpoint / MANIFEST).unlink()
    remove_tree(checkpoint)
