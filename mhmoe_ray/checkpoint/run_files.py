"""Files in a run directory that the model of a checkpoint needs, such as its tokenizer, verified by their hashes."""

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.data.shards.manifest import read_classes
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, describe_file


def verify_run_file(checkpoint: Location, path: Location, sha256: str | None, subject: str) -> Location:
    """Return the path of a file in the run directory of a checkpoint, after checking its hash.

    Args:
        checkpoint: checkpoint whose model needs the file; error messages name it.
        path: path of the file.
        sha256: expected SHA-256, that of the file with which the model was trained.
        subject: plain name of the file's content for error messages, such as "tokenizer".

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
    """Return the class names of each task of a vision model, in the order of the class numbers.

    Raises:
        CheckpointError: the run's file of class names cannot be read, or is not the one that the model was trained
            with.
        DataError: the file is damaged.
    """
    path = RunDir.of_checkpoint(checkpoint).classes_file
    return read_classes(verify_run_file(checkpoint, path, manifest.classes_sha256, "list of classes"))
