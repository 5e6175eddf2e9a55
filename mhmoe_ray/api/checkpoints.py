"""Checkpoints of a run: choose one whose weights are intact, and find the model that a text names."""

from os import PathLike
from pathlib import Path
from typing import NamedTuple

from mhmoe_ray.api.defaults import OnNote, ignore_note
from mhmoe_ray.checkpoint.huggingface.config import CONFIG
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
from mhmoe_ray.runs.directory import RunDir, find_run
from mhmoe_ray.storage import Location, describe_files, location


class Checkpoint(NamedTuple):
    """A committed checkpoint of a run."""

    name: str
    step: int
    path: Location


def list_checkpoints(run: RunDir) -> list[Checkpoint]:
    """Return the committed checkpoints of a run, oldest first, without verifying their files."""
    return [Checkpoint(path.name, step_and_group(path)[0], path) for path in committed_checkpoints(run)]


def pick_checkpoint(
    run: RunDir, name: str | None = None, *, verify_hashes: bool, on_note: OnNote = ignore_note
) -> tuple[Location, CheckpointManifest]:
    """Return the path and the manifest of a run's checkpoint: the named one, else the newest intact one.

    Args:
        run: the run.
        name: name of the checkpoint; None picks the newest.
        verify_hashes: whether to read all weights and compare their hashes with the manifest. Otherwise only names and
            sizes of files are compared, and other damage shows when the checkpoint is loaded.
        on_note: function that is called with a warning for each newer checkpoint that is damaged and therefore skipped.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged, or none of the run's checkpoints is intact.
    """
    # Only the weights of the checkpoint are used, so damage to other parts, such as optimizer states, is ignored.
    parts, describe = ("weights",), describe_files if verify_hashes else None
    if name:
        return run.checkpoints / name, read_manifest(run.checkpoints / name, parts, describe)
    newest = newest_checkpoint(run, parts, describe)
    if newest is None:
        raise CheckpointError(f"run {run.id}", "it has no checkpoint yet", "wait for one, or train a run")
    path, manifest, skipped = newest
    for error in skipped:
        on_note(f"warning: {error}")
    return path, manifest


def find_model_folder(model: str | PathLike[str], storage: Location | str) -> Location | RunDir:
    """Return what a text names: the folder of a checkpoint, a folder in Hugging Face's layout, or else a run.

    Args:
        model: path of a folder, hf:ORGANIZATION/NAME, or a run's id, the start of one, or its path.
        storage: folder that holds run directories.

    Raises:
        RunError: the text names none of them.
        CheckpointError: the hub has no such model or cannot be reached, or this package does not compute the model.
    """
    folder: Location = local_folder(str(model)) if "://" not in str(model) else location(str(model))
    if (isinstance(folder, Path) and (folder / CONFIG).is_file()) or (folder / MANIFEST).is_file():
        return folder
    return find_run(str(model), storage)
