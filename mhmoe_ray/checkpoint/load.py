"""Load a checkpoint: its tensors at any world size, a trainer's state, or a model.

Each rank wrote one file with slices of its own; a reader takes what it needs from all files. No rank waits for another.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mhmoe_ray.checkpoint.format import SUFFIX, Index, StoredSlice, _shape, read_into, slice_of, stored_slices
from mhmoe_ray.checkpoint.manifest import Manifest, read_manifest, removed
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location

if TYPE_CHECKING:  # serving does without distributed tensors
    from mhmoe_ray.distributed.mesh import Mesh
    from mhmoe_ray.distributed.strategies.ddp import Strategy


def load_tensors(
    folder: Location,
    into: Mapping[str, Tensor],
    on_slice: Callable[[], None] = lambda: None,
    index: Index | None = None,
) -> None:
    """Fill tensors in place, each in its own dtype, from the slices that a folder has; of DTensors, fill this rank's
    parts.

    One file at a time is open, since each of many ranks may have written one.

    Args:
        folder: folder of a part of a checkpoint, `weights` or `optim`.
        into: tensors to fill, by name.
        on_slice: called after each slice.
        index: result of `index_of` for this folder, if the caller has it.

    Raises:
        CheckpointError: a tensor is missing in the folder, wholly or in part, or has another shape; or the checkpoint
            was removed while it was read.
    """
    index = index_of(folder) if index is None else index
    targets = {name: slice_of(tensor) for name, tensor in into.items()}
    by_file: dict[Location, list[tuple[str, StoredSlice]]] = {}
    for name, target in targets.items():
        there = index.get(name, [])
        if not there:
            raise _unfit(folder, f"{name} is not in it")
        if (shape := _shape(there)) != (target.shape or (1,)):
            raise _unfit(folder, f"{name} has shape {shape} there and {target.shape} in the model")
        for stored in there:
            by_file.setdefault(stored.file, []).append((name, stored))
    filled = dict.fromkeys(targets, 0)
    for path, wanted in by_file.items():
        with _still_there(folder), path.open("rb", buffering=0) as file:
            for name, stored in wanted:
                filled[name] += read_into(targets[name], stored, file)
                on_slice()
    for name, target in targets.items():
        if filled[name] < target.local.numel():
            raise _unfit(folder, f"a part of {name} is not in it")


def index_of(folder: Location) -> Index:
    """Read the headers of all files in a folder, and return its slices.

    Raises:
        CheckpointError: a file is not a safetensors file, or the checkpoint was removed while it was read.
    """
    found: dict[str, list[StoredSlice]] = {}
    with _still_there(folder):
        files: list[Location] = list(folder.glob(f"*{SUFFIX}"))
        for file in sorted(files, key=lambda file: file.name):
            try:
                slices = stored_slices(file)
            except (ValueError, KeyError) as e:
                why = f"{file.name} cannot be read ({e})"
                raise CheckpointError(f"checkpoint {folder.parent}", why, "use another checkpoint of the run") from e
            for name, stored in slices.items():
                found.setdefault(name, []).append(stored)
    return found


@contextmanager
def _still_there(folder: Location) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise removed(folder.parent) from e


def _unfit(folder: Location, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder.parent}", why, "use the model section it was written by")


class TrainerState(Protocol):
    """Interface of a trainer (`train.step.Trainer`) that checkpoints need: the state that it holds, its mesh and
    device, and how far it is."""

    spec: RunSpec
    mesh: "Mesh"
    device: torch.device
    strategy: "Strategy"
    step: int
    tokens: int
    skipped: int
    skipped_in_a_row: int
    before_update: Callable[[], None]
    """Callback that is called when the state is about to change."""
    on_progress: Callable[[], None]


def restore(trainer: TrainerState, checkpoint: Location, manifest: Manifest) -> None:
    """Restore weights, moments, step, tokens and skipped steps from a checkpoint.

    This is a collective operation. The checkpoint may be written at any world size and by any strategy.
    """
    strategy = trainer.strategy
    strategy.begin_at(manifest.step - manifest.skipped)
    weights, moments = strategy.weights(), strategy.moments()
    load_tensors(checkpoint / "weights", weights, trainer.on_progress)
    load_tensors(checkpoint / "optim", moments, trainer.on_progress)
    strategy.loaded(weights, moments)
    trainer.step, trainer.tokens = manifest.step, manifest.tokens
    trainer.skipped, trainer.skipped_in_a_row = manifest.skipped, manifest.skipped_in_a_row


def load_model(checkpoint: Location) -> tuple[Decoder, Manifest]:
    """Load the model of a checkpoint written at any expert-parallel size, with all experts, ready for inference.

    Returns:
        The decoder in evaluation mode, float32, without gradients; and the manifest that it was built from.

    Raises:
        CheckpointError: the checkpoint is uncommitted, torn or damaged, or does not hold the model that its manifest
            names.
    """
    manifest = read_manifest(checkpoint, parts=("weights",))
    return model_of(checkpoint, manifest), manifest


def model_of(checkpoint: Location, manifest: Manifest) -> Decoder:
    """Load a model as `load_model` does, from a checkpoint whose manifest was read and whose weights were verified."""
    model = Decoder(manifest.model).requires_grad_(False).eval()
    for layer in model.moe_layers():
        layer.experts.kernel = "auto"  # that of the training may need a device or a package that is not here
    load_tensors(checkpoint / "weights", model.tensors())
    return model
