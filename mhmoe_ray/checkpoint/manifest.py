"""A checkpoint's manifest: written last, its presence is the commit.

    | in checkpoints/step_00000200.3/  | what                                          | written by    | read by      |
    | -------------------------------- | --------------------------------------------- | ------------- | ------------ |
    | weights/rank_00000.safetensors   | slices of tensors by name, float32; where one | each rank its | training,    |
    |                                  | begins in its tensor is in the file's header  | even share    | serving      |
    | optim/rank_00000.safetensors     | AdamW's two moments, `exp_avg` and            | likewise      | training     |
    |                                  | `exp_avg_sq` of each name, likewise           |               |              |
    | manifest.json                    | `Manifest` below: sizes and SHA-256 of all    | rank 0, when  | all, first   |
    |                                  | these files, and what they go with            | all are there |              |

An imported checkpoint has whole tensors in weights/model-*.safetensors, in the dtype that they came in, and no optim/;
its manifest has the token ids that end a text beside those that its tokenizer tells of (`ends`).

It is of step 200, by the third worker group of the run. Without manifest.json, or where a file is missing, is one too
many, or has another size or hash than there, it does not count (`read_manifest`).

A directory is never written twice: readers take every *.safetensors they find, so files of two saves in one folder
would load as a silent mix. For the same reason a folder must hold exactly the manifest's files.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import Describe, FileEntry, Location, describe_files, write_json

MANIFEST = "manifest.json"
PARTS = ("weights", "optim")


_FIX = "use another checkpoint of the run"


class Manifest(BaseModel):
    step: int
    """Steps done."""
    skipped: int = 0
    """Those of them that updated nothing, since their gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those of these that were the last ones."""
    tokens: int
    """Tokens predicted so far; padding is not among them."""
    position: int
    """Samples read so far: the place in the stream where training goes on."""
    seed: int | None
    """Of the initial weights and the order of the data; None for imported weights, which had neither here."""
    world: int
    ep: int
    """Workers and expert parallelism that wrote it; any other may load it."""
    model: ModelSpec
    seq_len: int
    ends: list[int] = []
    """Token ids that end a text beside the tokenizer's own (`data.tokenizer.boundaries`): those that an imported folder
    names. Manifests of before have none."""
    tokenizer_sha256: str
    data_sha256: str | None
    """Of the prepared data's manifest: `position` counts in that data and no other. None for imported weights, which
    were trained on no data prepared here."""
    files: dict[str, FileEntry]
    """By path below the checkpoint."""


_NAME = re.compile(r"step_\d+\.\d+")


def checkpoint_name(step: int, group: int) -> str:
    return f"step_{step:08d}.{group}"


def commit(checkpoint: Location, manifest: Manifest) -> None:
    """Make the checkpoint count."""
    write_json(checkpoint / MANIFEST, manifest.model_dump(mode="json"))


def stored_manifest(checkpoint: Location) -> Manifest:
    """The manifest of a checkpoint, whose files nobody looks at.

    Raises:
        CheckpointError: it is uncommitted, or its manifest is damaged.
    """
    try:
        return Manifest.model_validate(json.loads((checkpoint / MANIFEST).read_text()))
    except OSError as e:
        raise CheckpointError(f"checkpoint {checkpoint}", f"it has no readable {MANIFEST}", _FIX) from e
    except (ValueError, ValidationError) as e:
        raise CheckpointError(f"checkpoint {checkpoint}", f"its {MANIFEST} is damaged", _FIX) from e


def read_manifest(
    checkpoint: Location, parts: tuple[str, ...] = PARTS, describe: Describe | None = describe_files
) -> Manifest:
    """The manifest of a whole checkpoint, after checking names, sizes and hashes of the files of these parts.

    Args:
        checkpoint: its directory.
        parts: of which files are checked.
        describe: finds the hashes, for which all is read; None: names and sizes alone are checked.

    Raises:
        CheckpointError: it is uncommitted, torn, damaged, or removed while it is read; the reason says which file and
            how.
    """
    manifest = stored_manifest(checkpoint)
    try:
        problem = next(_problems(checkpoint, manifest, parts, describe), None)
    except FileNotFoundError as e:
        raise removed(checkpoint) from e
    if problem:
        raise CheckpointError(f"checkpoint {checkpoint}", problem, _FIX)
    return manifest


def removed(checkpoint: Location) -> CheckpointError:
    """Of a checkpoint that was there when reading it began."""
    why = "it was removed while it was read, as train.keep_checkpoints has old ones removed"
    return CheckpointError(f"checkpoint {checkpoint}", why, "use a newer one of the run")


def is_committed(checkpoint: Location) -> bool:
    """Whether it has a manifest; one that is dropped loses that first."""
    return (checkpoint / MANIFEST).exists()


def _problems(
    checkpoint: Location, manifest: Manifest, parts: tuple[str, ...], describe: Describe | None
) -> Iterator[str]:
    present = {f"{part}/{p.name}" for part in parts for p in checkpoint.glob(f"{part}/*")}
    files = {name: entry for name, entry in manifest.files.items() if name.startswith(tuple(f"{p}/" for p in parts))}
    yield from (f"{name} is missing" for name in sorted(files.keys() - present))
    yield from (f"{name} does not belong to it" for name in sorted(present - files.keys()))
    for name, expected in files.items():
        size = (checkpoint / name).stat().st_size
        if size != expected.size:
            yield f"{name} has {size} bytes, not {expected.size}"
    if describe is None:
        return
    for name, found in zip(files, describe([checkpoint / name for name in files]), strict=True):
        if found.sha256 != files[name].sha256:
            yield f"{name} does not have the hash it was written with"


def unfinished(run: RunDir) -> list[Location]:
    """Folders of checkpoints that were never committed: being written, or left by a process that was killed."""
    named = (p for p in run.checkpoints.glob("step_*") if _NAME.fullmatch(p.name))
    return sorted(p for p in named if not is_committed(p))


def committed(run: RunDir) -> list[Location]:
    """The checkpoints of a run that were committed, oldest first; whether they are whole, nobody has looked."""
    return [*_newest_first(run)][::-1]


def last_step(run: RunDir) -> int:
    """Of the newest committed checkpoint; 0 without any."""
    return next((step_and_group(checkpoint)[0] for checkpoint in _newest_first(run)), 0)


def _newest_first(run: RunDir) -> Iterator[Location]:
    """A group of workers goes on from what is newest and whole, perhaps from before a damaged one: so what a later
    group wrote is newer, even of an earlier step."""
    folders: list[Location] = [p for p in run.checkpoints.glob("step_*") if _NAME.fullmatch(p.name)]
    folders.sort(key=lambda folder: step_and_group(folder)[::-1], reverse=True)
    return (folder for folder in folders if is_committed(folder))


class Newest(NamedTuple):
    checkpoint: Location
    manifest: Manifest
    skipped: list[CheckpointError]
    """What was wrong with newer ones."""


def newest_checkpoint(
    run: RunDir, parts: tuple[str, ...] = PARTS, describe: Describe | None = describe_files
) -> Newest | None:
    """The newest whole checkpoint of a run; None if there is none.

    A directory without a manifest was never committed; it is passed over without a word. One that is dropped while it
    is read is too, and then there are newer ones than were found before.

    Args:
        run: whose checkpoints are looked at.
        parts: whose files are checked; without any, of each manifest only whether it can be read.
        describe: as `read_manifest` takes it.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; of the newest one.
    """
    skipped: list[CheckpointError] = []
    for checkpoint in _newest_first(run):
        try:
            return Newest(checkpoint, read_manifest(checkpoint, parts, describe), skipped)
        except CheckpointError as e:
            if not is_committed(checkpoint):
                return newest_checkpoint(run, parts, describe)
            skipped.append(e)
    if skipped:
        raise skipped[0]
    return None


def step_and_group(checkpoint: Location) -> tuple[int, int]:
    """What its name says."""
    step, _, group = checkpoint.name.removeprefix("step_").partition(".")
    return int(step), int(group)
