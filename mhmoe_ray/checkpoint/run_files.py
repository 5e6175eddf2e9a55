"""Files in the run directory of a checkpoint that its model needs, verified by their hashes."""

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.data.shards.manifest import read_classes
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, describe_file


def verify_run_file(checkpoint: Location, path: Location, sha256: str | None, subject: str) -> Location:
    """Return the path of a file in the run directory of a checkpoint, after checking its hash.

    Args:
        checkpoint: the checkpoint.
        path: path of the file.
        sha256: hash of the file that the model was trained with.
        subject: the plain name of its content, for the error.

    Raises:
        CheckpointError: the file cannot be read, or is not the one that the model was trained with.
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
    """Return the names of the classes of each task of a vision model, in the order of their numbers.

    Raises:
        CheckpointError: the run's file of them cannot be read, or is not the one that the model was trained with.
        DataError: the file is damaged.
    """
    path = RunDir.of_checkpoint(checkpoint).classes_file
    return read_classes(verify_run_file(checkpoint, path, manifest.classes_sha256, "list of classes"))
