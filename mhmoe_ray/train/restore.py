"""A trainer's state from a checkpoint; `saver.py` writes them."""

from collections.abc import Callable
from typing import Protocol

import torch

from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.distributed.strategies.ddp import Strategy
from mhmoe_ray.runs.manifest import Manifest
from mhmoe_ray.runs.tensors import load_tensors
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location


class TrainerState(Protocol):
    """What a checkpoint needs of a trainer (`train.step.Trainer`): the state that it holds, and where it is."""

    spec: RunSpec
    mesh: Mesh
    device: torch.device
    strategy: Strategy
    step: int
    tokens: int
    skipped: int
    skipped_in_a_row: int
    before_update: Callable[[], None]
    """Called when the state is about to change."""
    on_progress: Callable[[], None]


def restore(trainer: TrainerState, checkpoint: Location, manifest: Manifest) -> None:
    """Weights, moments, step and tokens of a checkpoint written at any world size and by any strategy. Collective."""
    strategy = trainer.strategy
    strategy.begin_at(manifest.step - manifest.skipped)
    weights, moments = strategy.weights(), strategy.moments()
    load_tensors(checkpoint / "weights", weights, trainer.on_progress)
    load_tensors(checkpoint / "optim", moments, trainer.on_progress)
    strategy.loaded(weights, moments)
    trainer.step, trainer.tokens = manifest.step, manifest.tokens
    trainer.skipped, trainer.skipped_in_a_row = manifest.skipped, manifest.skipped_in_a_row
