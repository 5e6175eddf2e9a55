"""Choose a checkpoint of a run whose weights are intact, and find the model that a user's text names."""

from operator import index
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

from mhmoe_ray.api.defaults import OnNote, ignore_note
from mhmoe_ray.checkpoint.find import find_checkpoint, find_run_or_checkpoint, no_checkpoint_error
from mhmoe_ray.checkpoint.huggingface.config import ADAPTER_CONFIG, CONFIG
from mhmoe_ray.checkpoint.huggingface.hub import local_folder
from mhmoe_ray.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    committed_checkpoints,
    newest_checkpoint,
    read_manifest,
    step_and_group,
)
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir, report_read_errors
from mhmoe_ray.storage import Location, describe_files, location


class Checkpoint(NamedTuple):
    """A committed checkpoint of a run. It can be given wherever a path is expected, and then means its folder."""

    name: str
    step: int
    path: Location

    def __fspath__(self) -> str:
        return str(self.path)


CheckpointName = str | int | Checkpoint
"""A user's choice of one of a run's checkpoints: its name, such as step_00000200.1; its step; or a `Checkpoint`."""


def path_text(path: str | PathLike[str] | Location) -> str:
    """Return a path as a text. A run or a checkpoint stands for its own path."""
    # A location in an object store is not a path of this machine, so it is not `PathLike`.
    return fspath(path) if isinstance(path, PathLike) else str(path)


def list_checkpoints(run: RunDir) -> list[Checkpoint]:
    """Return the committed checkpoints of a run, oldest first, without verifying their files."""
    return [Checkpoint(path.name, step_and_group(path)[0], path) for path in committed_checkpoints(run)]


def pick_checkpoint(
    run: RunDir, checkpoint: CheckpointName | None = None, *, verify_hashes: bool, on_note: OnNote = ignore_note
) -> tuple[Location, CheckpointManifest]:
    """Return the path and the manifest of a run's checkpoint: the named one, else the newest intact one.

    With `verify_hashes`, all weights are read and hashed. Otherwise only names and sizes of files are compared, and
    other damage shows when the checkpoint is loaded. `on_note` gets a warning for each damaged checkpoint that is
    skipped. A CheckpointError says that the checkpoint is missing or damaged, or that none is intact.
    """
    # Only the weights of the checkpoint are used, so damage to other parts, such as optimizer states, is ignored.
    parts, describe = ("weights",), describe_files if verify_hashes else None
    if isinstance(checkpoint, Checkpoint):
        if checkpoint.path.parent.absolute() != run.checkpoints.absolute():
            reason = f"it is of run {RunDir.of_checkpoint(checkpoint.path).id}, not of run {run.id}"
            raise CheckpointError(f"checkpoint {checkpoint.name}", reason, "give one of the run's `checkpoints()`")
        checkpoint = checkpoint.name
    if checkpoint is not None:
        path = find_checkpoint(run, checkpoint if isinstance(checkpoint, str) else index(checkpoint))
        return path, read_manifest(path, parts, describe)
    newest = newest_checkpoint(run, parts, describe)
    if newest is None:
        raise no_checkpoint_error(run)
    path, manifest, skipped = newest
    for error in skipped:
        on_note(f"warning: {error}")
    return path, manifest


def find_model_folder(model: str | PathLike[str], storage: Location | str) -> Location | RunDir:
    """Return the model that a text names: the folder of a checkpoint, a folder in Hugging Face's layout, or a run.

    The text is the path of a folder, hf:ORGANIZATION/NAME, RUN or RUN@STEP. An unknown name is a RunError, and a model
    that the hub does not give, that this package does not compute, or whose run lacks the step a CheckpointError.
    """
    name = path_text(model)
    folder: Location = local_folder(name) if "://" not in name else location(name)
    names = (CONFIG, ADAPTER_CONFIG, MANIFEST) if isinstance(folder, Path) else (MANIFEST,)
    if any(has_file(folder, name) for name in names):
        return folder
    return find_run_or_checkpoint(name, storage, f"model {name}")


def has_file(folder: Location, name: str) -> bool:
    """Return whether a folder, which need not exist, has a file of this name; an unreadable one is a StorageError."""
    with report_read_errors(folder):
        return (folder / name).is_file()


def refuse_checkpoint(checkpoint: CheckpointName | None, model: str) -> None:
    """Raise a CheckpointError if the user names a checkpoint in addition to a model that has only one."""
    if checkpoint is not None:
        name = checkpoint.name if isinstance(checkpoint, Checkpoint) else checkpoint
        reason = f"{model} is one model, not a run with several"
        raise CheckpointError(f"checkpoint {name}", reason, "leave out the name of the checkpoint")
