"""What a folder of prepared shards is: written last, its presence says that the folder is whole.

<prepared>/
  train/<domain>/00000.parquet ...   packed samples, one column `tokens` (see shards.py)
  validation/00000.parquet           the held-out samples
  tokenizer.json  quarantine.jsonl  manifest.json
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import RunSpec

FORMAT = 2
_READING = {"format", "text_field", "delimiter", "filters"}


class Shard(BaseModel):
    file: str
    """Below the folder."""
    rows: int
    sha256: str


class Domain(BaseModel):
    documents: int
    validation_documents: int
    quarantined: dict[str, int]
    """Lines, rows, files or lost parts of files that could not be read, by reason."""
    dropped: dict[str, int]
    """Documents that the source's filters left out, by rule."""
    tokens: int
    """Of its training documents, one end-of-text token for each included."""
    samples: int
    unused_tokens: int
    """Of its last, unfilled sample; always fewer than a sample has."""
    shards: list[Shard]


class Baselines(BaseModel):
    """What the validation tokens cost without a neural network, in nats per token."""

    unigram_entropy: float
    """Entropy of the validation tokens' own frequencies: no context-free model can do better on them."""
    bigram: float
    """Cross-entropy of a bigram model with Witten-Bell smoothing, counted on training tokens."""
    bigram_tokens: int
    """Training tokens it was counted on."""


class DataManifest(BaseModel):
    recipe: dict[str, Any]
    """The settings that made the folder."""
    seq_len: int
    token_bytes: int
    """2 or 4: little-endian unsigned integers."""
    tokenizer_sha256: str
    domains: dict[str, Domain]
    validation: list[Shard]
    validation_tokens: int
    """Predicted ones: padding of a last sample does not count."""
    baselines: Baselines
    bad_lines: int
    """All in quarantine."""


def recipe(spec: RunSpec) -> dict[str, Any]:
    """The settings that determine a prepared folder; the mixture is not among them, since it acts when reading."""
    data = spec.data
    return {
        "format": FORMAT,
        "sources": {name: str(source.path) for name, source in data.sources.items()},
        "subfolders": {name: named for name in data.sources if (named := data.subfolders(name))},
        "reading": {name: source.model_dump(mode="json", include=_READING) for name, source in data.sources.items()},
        "max_document_mb": data.max_document_mb,
        "vocab_size": spec.model.vocab_size,
        "seq_len": data.seq_len,
        "packing": data.packing,
        "tokenizer": str(data.tokenizer) if data.tokenizer else None,
        "tokenizer_train_mb": data.tokenizer_train_mb,
        "validation_fraction": data.validation_fraction,
        "validation_samples": data.validation_samples,
    }


def read_data_manifest(folder: Path) -> DataManifest | None:
    """None if the folder is not there.

    Raises:
        DataError: it is there without a readable manifest.
    """
    if not folder.exists():
        return None
    try:
        return DataManifest.model_validate(json.loads((folder / "manifest.json").read_text()))
    except (OSError, ValueError, ValidationError) as e:
        raise DataError(f"prepared data {folder}", "its manifest.json cannot be read", "remove the folder") from e


def require_data_manifest(folder: Path) -> DataManifest:
    """Raises:
    DataError: the folder is not prepared.
    """
    manifest = read_data_manifest(folder)
    if manifest is None:
        raise DataError(f"prepared data {folder}", "it is not there", "run: mhmoe data prepare SPEC")
    return manifest


def check_recipe(folder: Path, manifest: DataManifest, spec: RunSpec) -> None:
    """The folder was made with the settings of this spec.

    Raises:
        DataError: it was not; the first differing setting is named.
    """
    for key, wanted in recipe(spec).items():
        made = manifest.recipe.get(key)
        if made != wanted:
            why = f"it was made with {key} = {made}, and the spec says {wanted}"
            raise DataError(f"prepared data {folder}", why, "set data.prepared to another folder, or remove this one")
