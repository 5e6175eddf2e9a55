"""Files in a run directory that the model of a checkpoint needs, such as its tokenizer, verified by their hashes."""

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.data.shards.manifest import read_classes
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, describe_file


def verify_run_file(checkpoint: Location, path: Location, sha256: str | None, subject: str) -> Location:
    """Return `path` after checking that a file in the run directory of a checkpoint has the hash from training.

    Error messages call the content `subject`, such as "tokenizer". An unreadable or other file is a CheckpointError.
    """
    try:
        actual_sha256 = describe_file(path).sha256
    except OSError as e:
        reason = f"the {subject} of its run, {path}, cannot be read ({e.strerror or e})"
        raise CheckpointError(f"checkpoint {checkpoint}", reason, "keep the checkpoint inside its run directory") from e
    if actual_sha256 != sha256:
        reason = f"it was trained with another {subject} than {path}"
        raise CheckpointError(f"checkpoint {checkpoint}", reason, "restore that file")
    return path


def load_run_classes(checkpoint: Location, manifest: CheckpointManifest) -> dict[str, list[str]]:
    """Return the class names of a vision model's tasks, or the answers of an encoder's parts, in the order of numbers.

    An unreadable file or one with another hash is a CheckpointError, a damaged one a DataError.
    """
    path = RunDir.of_checkpoint(checkpoint).classes_file
    return read_classes(verify_run_file(checkpoint, path, manifest.classes_sha256, "list of classes"))
