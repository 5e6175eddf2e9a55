"""The manifest of a folder of prepared shards; it is written last, so its presence means that the folder is complete.

<prepared>/
  train/<domain>/00000.arrow ...   packed samples, one column `tokens` (see files.py)
  validation/00000.arrow           the held-out samples, domain by domain
  tokenizer.json  quarantine.jsonl  manifest.json
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mhmoe_ray.data.sources.find import fingerprints
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import describe_file

FORMAT = 3
_READING = {"format", "text_field", "delimiter", "filters"}


class Shard(BaseModel):
    file: str
    """Path of the file below the prepared folder."""
    rows: int
    sha256: str


class Domain(BaseModel):
    documents: int
    """Number of training documents."""
    validation_documents: int
    """Number of held-out documents."""
    quarantined: dict[str, int]
    """Number of lines, rows, files or lost parts of files that could not be read, by reason."""
    dropped: dict[str, int]
    """Number of documents that the source's filters dropped, by rule."""
    text_bytes: int
    """UTF-8 bytes of the texts of all training and held-out documents."""
    tokens: int
    """Number of tokens of the training documents, including one start token for each."""
    validation_tokens: int
    """Number of tokens of all held-out documents, including start tokens; the samples that were kept may have fewer."""
    samples: int
    validation_samples: int
    """Number of held-out samples that were kept."""
    unused_tokens: int
    """Number of tokens of the last, unfilled sample when documents are cut; always fewer than a sample has."""
    padding: int
    """Number of targets that do not count, in samples that were filled up because no document fits."""
    cut_documents: int
    """Number of training documents that no sample holds whole."""
    shards: list[Shard]


class Baselines(BaseModel):
    """Loss on the validation tokens without a neural network, in nats per token."""

    unigram_entropy: float
    """Entropy of the validation tokens' own frequencies: no context-free model can do better on them."""
    bigram: float
    """Cross-entropy of a bigram model with Witten-Bell smoothing, counted on training tokens."""
    bigram_tokens: int
    """Number of training tokens that the bigram model was counted on."""


class DataManifest(BaseModel):
    recipe: dict[str, Any]
    """The settings that made the folder, as `recipe` returns them."""
    fingerprints: dict[str, str] = {}
    """Fingerprint of each local source (see `data/sources/find.py`), by which text is recognised that was moved."""
    seq_len: int
    token_bytes: int
    """Bytes per token, 2 or 4; tokens are little-endian unsigned integers."""
    tokenizer_sha256: str
    domains: dict[str, Domain]
    validation: list[Shard]
    validation_tokens: int
    """Number of predicted tokens in the samples of `validation`, without padding. The field of the same name in
    `domains` counts all held-out tokens."""
    baselines: Baselines
    bad_lines: int
    """Number of all quarantined items, including lost parts, which `Tally.bad_lines` leaves out."""


def recipe(spec: RunSpec) -> dict[str, Any]:
    """Return the settings that determine a prepared folder.

    The mixture is not among them, since it acts when reading; a tokenizer that was trained for one mixture stays when
    the mixture changes.

    Raises:
        DataError: the given tokenizer cannot be read.
    """
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
        "tokenizer": _given_tokenizer(data.tokenizer) if data.tokenizer else None,
        "tokenizer_pattern": data.tokenizer_pattern,
        "tokenizer_model": None if data.tokenizer else data.tokenizer_model or "bpe",
        "tokenizer_train_mb": None if data.tokenizer else data.train_mb,
        "validation_fraction": data.validation_fraction,
        "validation_samples": data.validation_samples,
    }


def _given_tokenizer(path: Path) -> str:
    """Identify a given tokenizer by its content.

    Another file under the same name is another tokenizer, and the same file elsewhere is the same one.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return f"a file of SHA-256 {describe_file(path).sha256}"
    except OSError as e:
        raise DataError(f"tokenizer {path}", e.strerror or str(e), "restore it, or correct data.tokenizer") from e


def read_data_manifest(folder: Path) -> DataManifest | None:
    """Read the manifest of a prepared folder; return None if the folder does not exist.

    Raises:
        DataError: the folder exists but has no readable manifest.
    """
    what, other = f"prepared data {folder}", "set data.prepared to another folder, or remove this one"
    try:
        if not folder.exists():
            return None
        content = (folder / "manifest.json").read_bytes()
    except FileNotFoundError as e:
        raise DataError(what, "it has no manifest.json", other) from e
    except OSError as e:
        why = f"its manifest.json cannot be read ({e.strerror or e})"
        raise DataError(what, why, "see to its disk and permissions; the data may be sound") from e
    try:
        return DataManifest.model_validate(json.loads(content))
    except ValueError as e:
        raise DataError(what, "its manifest.json is damaged, or another version's", other) from e


def data_digest(folder: Path) -> str:
    """Return the hash by which checkpoints identify the data that they were trained on.

    It is the hash of the manifest, without the paths of sources that have a fingerprint. Folders of earlier versions,
    without fingerprints, are identified by the hash of the whole file.
    """
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if not manifest.get("fingerprints"):
        return describe_file(folder / "manifest.json").sha256
    sources = manifest["recipe"]["sources"]
    manifest["recipe"]["sources"] = {k: path for k, path in sources.items() if k not in manifest["fingerprints"]}
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


PreparedAs = tuple[Path, str]
"""A prepared folder, and the recipe by which it is to be prepared."""


def _is_same_text(manifest: DataManifest, spec: RunSpec) -> bool:
    """Return whether sources that lie elsewhere now have the content that they had when the folder was made."""
    made, wanted = manifest.recipe["sources"], recipe(spec)["sources"]
    moved = {name for name in wanted if made.get(name) != wanted[name]}
    if made.keys() != wanted.keys() or not moved <= manifest.fingerprints.keys():
        return False
    try:
        now = fingerprints(spec.data)
    except DataError:  # the text is not there; what the caller says names both places
        return False
    return all(now.get(name) == manifest.fingerprints[name] for name in moved)


def prepared_as(spec: RunSpec) -> PreparedAs:
    """Return a key that is equal for specs that read the same prepared data; a tokenizer is identified by its path."""
    given = spec.model_copy(update={"data": spec.data.model_copy(update={"tokenizer": None})})
    return spec.data.prepared, json.dumps([recipe(given), str(spec.data.tokenizer)], sort_keys=True, default=str)


def require_data_of(trained_on: str | None, folder: Path, otherwise: str) -> None:
    """Check that a prepared folder is the one that a checkpoint counts samples in.

    Args:
        trained_on: the data digest that the checkpoint has.
        folder: the prepared folder.
        otherwise: advice for the error message: what the user can do other than restore the folder.

    Raises:
        DataError: the folder has another digest.
    """
    if data_digest(folder) != trained_on:
        fix = f"restore the folder that the run began with, {otherwise}"
        raise DataError(f"prepared data {folder}", "it is not what the checkpoint was trained on", fix)


def require_data_manifest(folder: Path) -> DataManifest:
    """Return the manifest of a prepared folder.

    Raises:
        DataError: the folder is not prepared.
    """
    manifest = read_data_manifest(folder)
    if manifest is None:
        raise DataError(f"prepared data {folder}", "it is not there", "run: mhmoe data prepare SPEC")
    return manifest


def prepared_for(spec: RunSpec) -> DataManifest:
    """Return the manifest of a spec's prepared folder.

    Raises:
        DataError: the folder is not prepared, or it was made with other settings than the spec's.
    """
    manifest = require_data_manifest(spec.data.prepared)
    check_recipe(spec.data.prepared, manifest, spec)
    return manifest


def check_recipe(folder: Path, manifest: DataManifest, spec: RunSpec) -> None:
    """Check that a folder was made with the settings of a spec, and from the same text, which may have been moved.

    Raises:
        DataError: it was not; the message names the first setting that differs.
    """
    for key, wanted in recipe(spec).items():
        made = manifest.recipe.get(key)
        if made != wanted and not (key == "sources" and _is_same_text(manifest, spec)):
            why = f"it was made with {key} = {made}, and the spec says {wanted}"
            raise DataError(f"prepared data {folder}", why, "set data.prepared to another folder, or remove this one")
