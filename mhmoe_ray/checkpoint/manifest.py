"""Checkpoint manifest: manifest.json lists the files of a checkpoint; it is written last and commits the checkpoint.

    | in checkpoints/step_00000200.3/  | content                                       | written by    | read by      |
    | -------------------------------- | --------------------------------------------- | ------------- | ------------ |
    | weights/rank_00000.safetensors   | slices of tensors by name, float32; the       | each rank its | training,    |
    |                                  | file's header says where each slice begins    | even share    | serving      |
    | optim/rank_00000.safetensors     | slices of AdamW's two moments, `exp_avg` and  | each rank its | training     |
    |                                  | `exp_avg_sq` of each name, in the same way    | even share    |              |
    | manifest.json                    | `CheckpointManifest`: size and SHA-256 of     | rank 0, after | all, first   |
    |                                  | each file, model, step and position           | all files     |              |

This example is of step 200, written by the third worker group of the run. A checkpoint without manifest.json is
uncommitted and is ignored. It is damaged if a file is missing, is not in the manifest, or has another size or hash than
there (`read_manifest`).

An imported checkpoint has full tensors in weights/model-*.safetensors, in the dtype in which they were imported, and no
optim/. Its checkpoint manifest has the token ids that end a text in addition to those of its tokenizer (`ends`).

The checkpoint of step 0 of a run with a `start` section has full tensors too, in the dtype of the model that the run
starts from. It has optim/ only if `start.optimizer` is true.

A directory is never written twice: readers take every *.safetensors in it, so files of two saves would silently load as
a mix. For the same reason a directory must hold exactly the files of the manifest.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import Describe, FileEntry, Location, describe_files, write_json

MANIFEST = "manifest.json"
PARTS = ("weights", "optim")


_FIX = "use another checkpoint of the run"


class CheckpointManifest(BaseModel):
    """Content of a checkpoint's manifest.json: the progress of training, the model, and the files of the checkpoint."""

    step: int
    """Number of training steps done, including skipped ones."""
    skipped: int = 0
    """Number of training steps so far that updated no weights, because their gradient was not finite."""
    skipped_in_a_row: int = 0
    """Number of consecutive skipped steps up to this one; 0 if the last step updated the weights."""
    objective: dict[str, Any] | None = None
    """State of the training objective; None unless the model is a vision model with an adaptive number of experts."""
    updates_before: int = 0
    """Number of optimizer updates of the earlier runs whose moments this run copied at its start; 0 without a copy."""
    tokens: int
    """Number of tokens that training has predicted so far, without padding."""
    position: int
    """Number of samples read so far: the position in the stream where training continues."""
    seed: int | None
    """Seed of the initial weights and of the data order; None for imported weights, which were not trained here."""
    world: int
    ep: int
    """Number of workers (`world`) that wrote the checkpoint, and their expert-parallel size (`ep`). The
    checkpoint can be loaded with any other sizes."""
    model: ModelSpec
    seq_len: int
    ends: list[int] = []
    """Token ids that end a text, in addition to the tokenizer's own end tokens (`data.tokenizer.boundaries`).
    An imported folder names them, or they end an assistant's turn in the training data. Older manifests have none."""
    adds_start: bool = True
    """Whether a start token precedes each text; false for imported weights whose own tokenizer adds none."""
    tokenizer_sha256: str | None
    """SHA-256 of the run's tokenizer.json; None for a vision model, which has no tokenizer."""
    classes_sha256: str | None = None
    """SHA-256 of the run's file of class names; None unless the model is a vision model."""
    data_sha256: str | None
    """Hash of the manifest of the prepared data in which `position` counts samples. It is None for imported
    weights, which were not trained on data prepared here."""
    files: dict[str, FileEntry]
    """Size and hash of each file, by path below the checkpoint."""

    @property
    def has_moments(self) -> bool:
        """True if the checkpoint has files with the optimizer's moments."""
        return any(name.startswith("optim/") for name in self.files)

    @property
    def updates(self) -> int:
        """The number of optimizer updates so far, including those of earlier runs whose moments this run copied."""
        return self.updates_before + self.step - self.skipped


_NAME_PATTERN = re.compile(r"step_\d+\.\d+")


def checkpoint_name(step: int, group: int) -> str:
    """Return the directory name of the checkpoint that worker group `group` writes at step `step`."""
    return f"step_{step:08d}.{group}"


def commit(checkpoint: Location, manifest: CheckpointManifest) -> None:
    """Commit a checkpoint by writing its manifest, after all its other files are written."""
    write_json(checkpoint / MANIFEST, manifest.model_dump(mode="json"))


def stored_manifest(checkpoint: Location) -> CheckpointManifest:
    """Return the manifest of a checkpoint without verifying its files.

    Raises:
        CheckpointError: the checkpoint is uncommitted, or its manifest is damaged.
    """
    try:
        return CheckpointManifest.model_validate(json.loads((checkpoint / MANIFEST).read_text()))
    except OSError as e:
        raise CheckpointError(f"checkpoint {checkpoint}", f"it has no readable {MANIFEST}", _FIX) from e
    except (ValueError, ValidationError) as e:
        raise CheckpointError(f"checkpoint {checkpoint}", f"its {MANIFEST} is damaged", _FIX) from e


def read_manifest(
    checkpoint: Location, parts: tuple[str, ...] = PARTS, describe: Describe | None = describe_files
) -> CheckpointManifest:
    """Check the names, sizes and hashes of a checkpoint's files against its manifest, and return the manifest.

    Args:
        checkpoint: directory of the checkpoint.
        parts: folders of the checkpoint whose files are checked: `weights`, `optim` or both.
        describe: function that reads all files and computes their hashes; with None only names and sizes are checked.

    Raises:
        CheckpointError: the checkpoint is uncommitted, incomplete, damaged, or removed while it is read; the message
            names the file and the damage.
    """
    manifest = stored_manifest(checkpoint)
    try:
        problem = next(_problems(checkpoint, manifest, parts, describe), None)
    except FileNotFoundError as e:
        raise removed_error(checkpoint) from e
    if problem:
        raise CheckpointError(f"checkpoint {checkpoint}", problem, _FIX)
    return manifest


def removed_error(checkpoint: Location) -> CheckpointError:
    """Return the error for a checkpoint that was removed while it was read."""
    reason = "it was removed while it was read, because train.keep_checkpoints removes old checkpoints"
    return CheckpointError(f"checkpoint {checkpoint}", reason, "use a newer one of the run")


def is_committed(checkpoint: Location) -> bool:
    """Return whether a checkpoint is committed, which means that its manifest exists."""
    return (checkpoint / MANIFEST).exists()


def _problems(
    checkpoint: Location, manifest: CheckpointManifest, parts: tuple[str, ...], describe: Describe | None
) -> Iterator[str]:
    """Yield a text about each difference between the files in the folders `parts` of a checkpoint and its manifest.

    Wrong names and sizes come first, because no file needs to be read to find them.
    """
    present = {f"{part}/{p.name}" for part in parts for p in checkpoint.glob(f"{part}/*")}
    files = {name: entry for name, entry in manifest.files.items() if name.startswith(tuple(f"{p}/" for p in parts))}
    yield from (f"{name} is missing" for name in sorted(files.keys() - present))
    yield from (f"{name} does not belong to it" for name in sorted(present - files.keys()))
    for name, expected in files.items():
        # Sizes are compared first: this needs no read of the file, and finds a file that was cut off.
        size = (checkpoint / name).stat().st_size
        if size != expected.size:
            yield f"{name} has {size} bytes, not {expected.size}"
    if describe is None:
        return
    for name, actual_entry in zip(files, describe([checkpoint / name for name in files]), strict=True):
        if actual_entry.sha256 != files[name].sha256:
            yield f"{name} does not have the hash it was written with"


def uncommitted_checkpoints(run: RunDir) -> list[Location]:
    """Return the directories of a run's uncommitted checkpoints, either in progress or left by a killed process."""
    checkpoints = (p for p in run.checkpoints.glob("step_*") if _NAME_PATTERN.fullmatch(p.name))
    return sorted(p for p in checkpoints if not is_committed(p))


def committed_checkpoints(run: RunDir) -> list[Location]:
    """Return the committed checkpoints of a run, oldest first, without verifying their files."""
    return [*_committed_newest_first(run)][::-1]


def last_step(run: RunDir) -> int:
    """Return the step of a run's newest committed checkpoint; 0 if there is none."""
    return next((step_and_group(checkpoint)[0] for checkpoint in _committed_newest_first(run)), 0)


def _committed_newest_first(run: RunDir) -> Iterator[Location]:
    """Return the committed checkpoints of a run, newest first: later worker groups first, then later steps."""
    # Workers that are started again form a new worker group. It continues from the newest intact checkpoint, which may
    # be older than a damaged one. So a checkpoint of a later group is newer, even if its step is earlier.
    checkpoints: list[Location] = [p for p in run.checkpoints.glob("step_*") if _NAME_PATTERN.fullmatch(p.name)]
    checkpoints.sort(key=lambda folder: step_and_group(folder)[::-1], reverse=True)
    return (folder for folder in checkpoints if is_committed(folder))


class NewestCheckpoint(NamedTuple):
    """Newest intact checkpoint of a run, with its manifest."""

    checkpoint: Location
    manifest: CheckpointManifest
    skipped: list[CheckpointError]
    """Errors about newer checkpoints that were skipped because they are damaged, newest first."""


def newest_checkpoint(
    run: RunDir, parts: tuple[str, ...] = PARTS, describe: Describe | None = describe_files
) -> NewestCheckpoint | None:
    """Return the newest intact checkpoint of a run; None if the run has no committed checkpoint.

    Uncommitted checkpoints are skipped silently.

    Args:
        run: the run whose checkpoints are searched.
        parts: folders of each checkpoint whose files are checked; with an empty tuple, only the manifests are read.
        describe: function that computes the hashes of files; with None only names and sizes are checked.

    Raises:
        CheckpointError: the run has committed checkpoints, but none is intact; the error describes the newest one.
    """
    skipped: list[CheckpointError] = []
    for checkpoint in _committed_newest_first(run):
        try:
            return NewestCheckpoint(checkpoint, read_manifest(checkpoint, parts, describe), skipped)
        except CheckpointError as e:
            # Retention deleted the checkpoint while it was read. There are newer ones then, so the search restarts.
            if not is_committed(checkpoint):
                return newest_checkpoint(run, parts, describe)
            skipped.append(e)
    # If all checkpoints are damaged, this is an error, because training must not silently start from the beginning.
    if skipped:
        raise skipped[0]
    return None


def step_and_group(checkpoint: Location) -> tuple[int, int]:
    """Return the step and the number of the worker group from the name of a checkpoint."""
    step, _, group = checkpoint.name.removeprefix("step_").partition(".")
    return int(step), int(group)
