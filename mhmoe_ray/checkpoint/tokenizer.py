"""Tokenizer of a checkpoint: the tokenizer.json in its run directory, verified by its hash."""

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.data.tokenizer.load import load_tokenizer
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, describe_file


def run_tokenizer(checkpoint: Location, manifest: CheckpointManifest) -> Location:
    """Return the path of tokenizer.json in the run directory of a checkpoint, after checking its hash.

    Raises:
        CheckpointError: the file cannot be read, or is not the tokenizer that the model was trained with.
    """
    path = RunDir.of_checkpoint(checkpoint).tokenizer_file
    subject = f"checkpoint {checkpoint}"
    try:
        sha256 = describe_file(path).sha256
    except OSError as e:
        reason = f"the tokenizer of its run, {path}, cannot be read ({e.strerror or e})"
        raise CheckpointError(subject, reason, "keep the checkpoint inside its run directory") from e
    if sha256 != manifest.tokenizer_sha256:
        raise CheckpointError(subject, f"it was trained with another tokenizer than {path}", "restore that file")
    return path


def load_run_tokenizer(checkpoint: Location, manifest: CheckpointManifest) -> Tokenizer:
    """Load the tokenizer from the run directory of a checkpoint, after checking its hash.

    Raises:
        CheckpointError: the file cannot be read, or is not the tokenizer that the model was trained with.
        DataError: the file is not a tokenizer for a model with this vocabulary size.
    """
    return load_tokenizer(run_tokenizer(checkpoint, manifest), manifest.model.vocab_size)
