"""A trainer's state from a checkpoint; `saver.py` writes them."""

from mhmoe_ray.runs.manifest import Manifest
from mhmoe_ray.runs.tensors import load_tensors
from mhmoe_ray.storage import Location
from mhmoe_ray.train.step import Trainer


def restore(trainer: Trainer, checkpoint: Location, manifest: Manifest) -> None:
    """Weights, moments, step and tokens of a checkpoint written at any world size and by any strategy. Collective."""
    strategy = trainer.strategy
    strategy.begin_at(manifest.step - manifest.skipped)
    weights, moments = strategy.weights(), strategy.moments()
    load_tensors(checkpoint / "weights", weights, trainer.on_progress)
    load_tensors(checkpoint / "optim", moments, trainer.on_progress)
    strategy.loaded(weights, moments)
    trainer.step, trainer.tokens = manifest.step, manifest.tokens
    trainer.skipped, trainer.skipped_in_a_row = manifest.skipped, manifest.skipped_in_a_row
