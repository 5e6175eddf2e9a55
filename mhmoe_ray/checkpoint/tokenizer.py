"""Tokenizer of a checkpoint: the tokenizer.json in its run directory, verified by its hash."""

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.checkpoint.run_files import verify_run_file
from mhmoe_ray.data.tokenizer.load import load_tokenizer
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location


def run_tokenizer(checkpoint: Location, manifest: CheckpointManifest) -> Location:
    """Return the path of tokenizer.json in the run directory of a checkpoint, after checking its hash.

    Raises:
        CheckpointError: the file cannot be read, or is not the tokenizer that the model was trained with; or the model
            is a vision model, which has no tokenizer.
    """
    family = manifest.model.family
    if not family.has_tokenizer:
        reason = f"its model is {family.title}, which reads no texts"
        raise CheckpointError(f"checkpoint {checkpoint}", reason, "serve it with `mhmoe serve deploy`")
    path = RunDir.of_checkpoint(checkpoint).tokenizer_file
    return verify_run_file(checkpoint, path, manifest.tokenizer_sha256, "tokenizer")


def load_run_tokenizer(checkpoint: Location, manifest: CheckpointManifest) -> Tokenizer:
    """Load the tokenizer from the run directory of a checkpoint, after checking its hash.

    Raises:
        CheckpointError: the file cannot be read or has another hash, or the model has no tokenizer (`run_tokenizer`).
        DataError: the tokenizer does not fit the model's vocabulary size, or the file holds no valid tokenizer.
    """
    return load_tokenizer(run_tokenizer(checkpoint, manifest), manifest.model.vocab_size)
