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

Of a run with `train.adapter`, weights/ and optim/ of all later checkpoints have the adapter alone. Its base is the
checkpoint of step 0, whose weights all readers add to it (`WeightsReader` in load.py).

With `train.ema_decay`, weights/ has the average of each trained weight, and optim/ the weight itself as `trained.NAME`.

A directory is never written twice: readers take every *.safetensors in it, so files of two saves would silently load as
a mix. For the same reason a directory must hold exactly the files of the manifest.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.parsing import parse_json
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.adapter import AdapterSpec
from mhmoe_ray.storage import (
    Describe,
    FileEntry,
    Location,
    describe_files,
    is_special,
    matching_paths,
    read_file,
    write_json,
)

MANIFEST = "manifest.json"
PARTS = ("weights", "optim")


_FIX = "use another checkpoint of the run"


class AdapterRecord(BaseModel):
    """Adapter in a checkpoint, and the base that it adapts."""

    spec: AdapterSpec
    base: str
    """Name of the base, which is another checkpoint of the same run."""
    base_sha256: str
    """`CheckpointManifest.weights_sha256` of the base."""


class CheckpointManifest(BaseModel):
    """Content of a checkpoint's manifest.json: the progress of training, the model, and the files of the checkpoint."""

    step: int
    """Number of training steps done, including skipped ones."""
    skipped: int = 0
    """Number of steps that updated no weights, because their gradient was not finite or they were spikes."""
    skipped_in_a_row: int = 0
    """Number of consecutive skipped steps up to this one."""
    recent_updates: list[list[float]] = []
    """Loss and gradient norm of the last updates, with which spikes are compared; only with `train.spikes`."""
    objective: dict[str, Any] | None = None
    """State of the training objective: the hash of the reference log-probabilities of pairs, or the numbers of experts
    of an adaptive vision model."""
    updates_before: int = 0
    """Number of optimizer updates of the earlier runs whose moments this run copied at its start."""
    tokens: int
    """Number of predicted tokens so far, without padding."""
    position: int
    """Number of samples read so far, from which training continues."""
    seed: int | None
    """Seed of the initial weights and of the data order; None for imported weights."""
    world: int
    ep: int
    """World size and expert-parallel size of the writers; any others can load the checkpoint."""
    model: ModelSpec
    adapter: AdapterRecord | None = None
    """The adapter that the checkpoint has in place of weights; None for a checkpoint with all weights."""
    is_averaged: bool = False
    """True if weights/ has moving averages (`train.ema_decay`), and optim/ the weights that are trained."""
    seq_len: int
    ends: list[int] = []
    """Token ids that end a text in addition to those of the tokenizer (`data.tokenizer.boundaries`): an imported folder
    names them, or they end an assistant's turn in the training data. Older manifests have none."""
    adds_start: bool = True
    """Whether a start token precedes each text; false for imported weights whose own tokenizer adds none."""
    tokenizer_sha256: str | None
    """Hash of the run's tokenizer.json; None for a vision model."""
    classes_sha256: str | None = None
    """Hash of the file of class names or answers; None for models without classes."""
    data_sha256: str | None
    """Hash of the manifest of the prepared data in which `position` counts samples; None for imported weights."""
    files: dict[str, FileEntry]
    """Size and hash of each file, by path below the checkpoint."""

    @property
    def has_moments(self) -> bool:
        """True if the checkpoint has the optimizer's moments."""
        return any(name.startswith("optim/") for name in self.files)

    @property
    def weights_sha256(self) -> str:
        """Hash of the names and contents of the files with weights."""
        hashes = {name: entry.sha256 for name, entry in self.files.items() if name.startswith("weights/")}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    @property
    def updates(self) -> int:
        """The number of optimizer updates so far, including `updates_before`."""
        return self.updates_before + self.step - self.skipped


_NAME_PATTERN = re.compile(r"step_\d+\.\d+")


def checkpoint_name(step: int, group: int) -> str:
    """Return the directory name of the checkpoint that a worker group writes at a step."""
    return f"step_{step:08d}.{group}"


def commit(checkpoint: Location, manifest: CheckpointManifest) -> None:
    """Commit a checkpoint by writing its manifest, after all its other files are written."""
    write_json(checkpoint / MANIFEST, manifest.model_dump(mode="json"))


def stored_manifest(checkpoint: Location) -> CheckpointManifest:
    """Return a checkpoint's manifest without verifying files; CheckpointError if it is uncommitted or damaged."""
    try:
        return CheckpointManifest.model_validate(parse_json(read_file(checkpoint / MANIFEST)))
    except OSError as e:
        raise CheckpointError(f"checkpoint {checkpoint}", f"it has no readable {MANIFEST}", _FIX) from e
    except (ValueError, ValidationError) as e:
        raise CheckpointError(f"checkpoint {checkpoint}", f"its {MANIFEST} is damaged", _FIX) from e


def read_manifest(
    checkpoint: Location, parts: tuple[str, ...] = PARTS, describe: Describe | None = describe_files
) -> CheckpointManifest:
    """Verify the files in the folders `parts` of a checkpoint against its manifest, and return the manifest.

    `describe` computes hashes; with None only names and sizes are checked. A checkpoint that is uncommitted,
    incomplete, damaged or removed meanwhile is a CheckpointError, which names the file and the damage.
    """
    manifest = stored_manifest(checkpoint)
    try:
        problem = next(_problems(checkpoint, manifest, parts, describe), None)
    except FileNotFoundError as e:
        raise removed_error(checkpoint) from e
    if problem:
        raise CheckpointError(f"checkpoint {checkpoint}", problem, _FIX)
    if manifest.adapter and "weights" in parts:
        base_manifest = read_manifest(checkpoint.with_name(manifest.adapter.base), ("weights",), describe)
        if base_manifest.weights_sha256 != manifest.adapter.base_sha256:
            reason = f"its base {manifest.adapter.base} has other weights than those it was trained on"
            raise CheckpointError(f"checkpoint {checkpoint}", reason, "restore the base")
    return manifest


def removed_error(checkpoint: Location) -> CheckpointError:
    """Return the error for a checkpoint that was removed while it was read."""
    reason = "it was removed while it was read, because train.keep_checkpoints removes old checkpoints"
    return CheckpointError(f"checkpoint {checkpoint}", reason, "use a newer one of the run")


def is_committed(checkpoint: Location) -> bool:
    """Return whether a checkpoint's manifest exists."""
    return (checkpoint / MANIFEST).exists()


def _problems(
    checkpoint: Location, manifest: CheckpointManifest, parts: tuple[str, ...], describe: Describe | None
) -> Iterator[str]:
    """Yield a text about each difference from the manifest: wrong names and sizes first, because they need no read."""
    present = {f"{part}/{p.name}" for part in parts for p in checkpoint.glob(f"{part}/*")}
    files = {name: entry for name, entry in manifest.files.items() if name.startswith(tuple(f"{p}/" for p in parts))}
    yield from (f"{name} is missing" for name in sorted(files.keys() - present))
    yield from (f"{name} does not belong to it" for name in sorted(present - files.keys()))
    for name, expected in files.items():
        if is_special(checkpoint / name):
            yield f"{name} is no regular file"
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
    """Return a run's uncommitted checkpoints: in progress, or left by a killed process."""
    checkpoints = (p for p in matching_paths(run.checkpoints, "step_*") if _NAME_PATTERN.fullmatch(p.name))
    return sorted(p for p in checkpoints if not is_committed(p))


def committed_checkpoints(run: RunDir) -> list[Location]:
    """Return a run's committed checkpoints, oldest first, without verifying their files."""
    return [*_committed_newest_first(run)][::-1]


def last_step(run: RunDir) -> int:
    """Return the step of a run's newest committed checkpoint; 0 if there is none."""
    return next((step_and_group(checkpoint)[0] for checkpoint in _committed_newest_first(run)), 0)


def _committed_newest_first(run: RunDir) -> Iterator[Location]:
    """Return the committed checkpoints of a run, newest first: later worker groups first, then later steps."""
    # Workers that are started again form a new worker group. It continues from the newest intact checkpoint, which may
    # be older than a damaged one. So a checkpoint of a later group is newer, even if its step is earlier.
    checkpoints = [p for p in matching_paths(run.checkpoints, "step_*") if _NAME_PATTERN.fullmatch(p.name)]
    checkpoints.sort(key=lambda folder: step_and_group(folder)[::-1], reverse=True)
    return (folder for folder in checkpoints if is_committed(folder))


class NewestCheckpoint(NamedTuple):
    """Newest intact checkpoint of a run, with its manifest."""

    checkpoint: Location
    manifest: CheckpointManifest
    skipped: list[CheckpointError]
    """Errors about newer, damaged checkpoints, newest first."""


def newest_checkpoint(
    run: RunDir, parts: tuple[str, ...] = PARTS, describe: Describe | None = describe_files
) -> NewestCheckpoint | None:
    """Return the newest intact checkpoint of a run; None without a committed checkpoint.

    The arguments are those of `read_manifest`; with empty `parts`, only manifests are read. If all committed
    checkpoints are damaged, the error about the newest one is raised (CheckpointError).
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
