"""Tokenizer of a checkpoint: the one in its run directory, verified by its hash."""

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import Manifest
from mhmoe_ray.data.tokenizer.load import load_tokenizer
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, describe_file


def run_tokenizer(checkpoint: Location, manifest: Manifest) -> Location:
    """Return the path of tokenizer.json in the run that the checkpoint lies in.

    Raises:
        CheckpointError: the file cannot be read, or is not the tokenizer that the model was trained with.
    """
    path = RunDir.of_checkpoint(checkpoint).tokenizer_file
    what = f"checkpoint {checkpoint}"
    try:
        found = describe_file(path).sha256
    except OSError as e:
        why = f"the tokenizer of its run, {path}, cannot be read ({e.strerror or e})"
        raise CheckpointError(what, why, "keep the checkpoint inside its run directory") from e
    if found != manifest.tokenizer_sha256:
        raise CheckpointError(what, f"it was trained with another tokenizer than {path}", "restore that file")
    return path


def load_run_tokenizer(checkpoint: Location, manifest: Manifest) -> Tokenizer:
    """Load the tokenizer of the run that a checkpoint lies in.

    Raises:
        CheckpointError: the file cannot be read, or is not the tokenizer that the model was trained with.
        DataError: the file is not a tokenizer for a model with this vocabulary size.
    """
    return load_tokenizer(run_tokenizer(checkpoint, manifest), manifest.model.vocab_size)
