"""Names of images that the web page of an encoder proposes: captions of the training's held-out images."""

import logging
from collections.abc import Sequence

import pyarrow as pa
from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.data.shards.columns import padding_token
from mhmoe_ray.data.shards.manifest import data_digest, read_data_manifest
from mhmoe_ray.data.tokenizer import DocumentEncoder
from mhmoe_ray.errors import DataError
from mhmoe_ray.families.encoder.data.samples import held_out_captions
from mhmoe_ray.families.encoder.serving.request import MAX_DOCUMENTS
from mhmoe_ray.runs.directory import RunDir

logger = logging.getLogger("ray.serve")


def held_out_names(run: RunDir, checkpoint_manifest: CheckpointManifest, tokenizer: Tokenizer) -> list[str]:
    """Return distinct captions of a run's held-out images, except those that were cut to the model's longest text.

    There are at most as many as a request to /rerank may have documents. There are none if the training data is
    missing, has changed or cannot be read.
    """
    try:
        names = _read_names(run, checkpoint_manifest, tokenizer)
    # The model can answer without names, whereas an error would make Serve start the replica again and again.
    except (DataError, OSError, pa.ArrowInvalid) as e:
        logger.warning("The page proposes no names, because the data of the training cannot be read: %s", e)
        return []
    return evenly_spaced(names, MAX_DOCUMENTS)


def evenly_spaced(sorted_names: Sequence[str], limit: int) -> list[str]:
    """Return at most `limit` names of a sorted list, evenly spaced, so that they cover the whole alphabet."""
    return list(sorted_names[:: -(-len(sorted_names) // limit) or 1])


def _read_names(run: RunDir, checkpoint_manifest: CheckpointManifest, tokenizer: Tokenizer) -> list[str]:
    """Return the sorted captions of a run's held-out images; none without data or if it is not the checkpoint's."""
    spec = run.spec()
    manifest = read_data_manifest(spec.data.prepared)
    if manifest is None or data_digest(spec.data.prepared) != checkpoint_manifest.data_sha256:
        return []
    padding = padding_token(manifest.token_bytes)
    rows = [[token for token in row if token != padding] for row in held_out_captions(spec, manifest).tolist()]
    names = [name.strip() for name in tokenizer.decode_batch([row[1:] for row in rows])]
    encoded_names = DocumentEncoder(tokenizer).encode(names)
    # A client sends a name back as text, which must become the same tokens again. If a caption was cut, the text may
    # turn into other tokens, and into more than the model reads.
    return sorted({name for name, row, encoded in zip(names, rows, encoded_names, strict=True) if row == encoded})
