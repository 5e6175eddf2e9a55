"""Tokenizer of a checkpoint: the tokenizer.json in its run directory, verified by its hash."""

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.checkpoint.run_files import verify_run_file
from mhmoe_ray.data.tokenizer.load import load_tokenizer
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location


def run_tokenizer(checkpoint: Location, manifest: CheckpointManifest) -> Location:
    """Return the path of the tokenizer.json of a checkpoint's run, after checking its hash.

    An unreadable file, another hash, or a vision model, which has no tokenizer, is a CheckpointError.
    """
    family = manifest.model.family
    if not family.has_tokenizer:
        reason = f"its model is {family.title}, which reads no texts"
        raise CheckpointError(f"checkpoint {checkpoint}", reason, "serve it with `mhmoe serve deploy`")
    path = RunDir.of_checkpoint(checkpoint).tokenizer_file
    return verify_run_file(checkpoint, path, manifest.tokenizer_sha256, "tokenizer")


def load_run_tokenizer(checkpoint: Location, manifest: CheckpointManifest) -> Tokenizer:
    """Load the tokenizer that `run_tokenizer` finds; DataError if it is invalid or does not fit the vocabulary size."""
    return load_tokenizer(run_tokenizer(checkpoint, manifest), manifest.model.vocab_size)
