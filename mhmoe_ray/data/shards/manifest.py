"""What a folder of prepared shards is: written last, its presence says that the folder is whole.

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
    """Below the folder."""
    rows: int
    sha256: str


class Domain(BaseModel):
    documents: int
    """For training."""
    validation_documents: int
    """Held out."""
    quarantined: dict[str, int]
    """Lines, rows, files or lost parts of files that could not be read, by reason."""
    dropped: dict[str, int]
    """Documents that the source's filters left out, by rule."""
    text_bytes: int
    """UTF-8, of all these documents."""
    tokens: int
    """Of its training documents, one start token for each included."""
    validation_tokens: int
    """Of all its held-out documents, likewise; the samples that are kept may have fewer."""
    samples: int
    validation_samples: int
    """Held-out samples that were kept."""
    unused_tokens: int
    """Of its last, unfilled sample when documents are cut; always fewer than a sample has."""
    padding: int
    """Targets that do not count, of samples filled up because no document fits."""
    cut_documents: int
    """Of its training documents, those that no sample holds whole."""
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
    fingerprints: dict[str, str] = {}
    """What each source of the machine held (`data/sources/find.py`), by which text that was moved is known."""
    seq_len: int
    token_bytes: int
    """2 or 4: little-endian unsigned integers."""
    tokenizer_sha256: str
    domains: dict[str, Domain]
    validation: list[Shard]
    validation_tokens: int
    """Predicted ones of the samples in `validation`, without padding; those of domains are all held-out tokens."""
    baselines: Baselines
    bad_lines: int
    """All in quarantine, lost parts included, which `Tally.bad_lines` leaves out."""


def recipe(spec: RunSpec) -> dict[str, Any]:
    """The settings that determine a prepared folder. The mixture is not among them, since it acts when reading; a
    tokenizer trained for one mixture stays when that changes.

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
    """By its content: another file under the same name is another tokenizer, and the same one elsewhere is not."""
    try:
        return f"a file of SHA-256 {describe_file(path).sha256}"
    except OSError as e:
        raise DataError(f"tokenizer {path}", e.strerror or str(e), "restore it, or correct data.tokenizer") from e


def read_data_manifest(folder: Path) -> DataManifest | None:
    """None if the folder is not there.

    Raises:
        DataError: it is there without a readable manifest.
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
    """Return the hash by which checkpoints know what they were trained on: that of the manifest, without the paths of
    sources that have a fingerprint. Folders of earlier versions, without fingerprints, are known by the whole file."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if not manifest.get("fingerprints"):
        return describe_file(folder / "manifest.json").sha256
    sources = manifest["recipe"]["sources"]
    manifest["recipe"]["sources"] = {k: path for k, path in sources.items() if k not in manifest["fingerprints"]}
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


PreparedAs = tuple[Path, str]
"""A folder, and the recipe by which it is to be prepared."""


def _is_same_text(manifest: DataManifest, spec: RunSpec) -> bool:
    """Whether sources that lie elsewhere now hold what they held."""
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
    """What specs have in common that read the same prepared text; a tokenizer is taken by its name."""
    given = spec.model_copy(update={"data": spec.data.model_copy(update={"tokenizer": None})})
    return spec.data.prepared, json.dumps([recipe(given), str(spec.data.tokenizer)], sort_keys=True, default=str)


def require_data_of(trained_on: str | None, folder: Path, otherwise: str) -> None:
    """Raises:
    DataError: the folder is not the one that a checkpoint counts samples in, by that one's digest; `otherwise` is what
        can be done beside restoring it.
    """
    if data_digest(folder) != trained_on:
        fix = f"restore the folder that the run began with, {otherwise}"
        raise DataError(f"prepared data {folder}", "it is not what the checkpoint was trained on", fix)


def require_data_manifest(folder: Path) -> DataManifest:
    """Raises:
    DataError: the folder is not prepared.
    """
    manifest = read_data_manifest(folder)
    if manifest is None:
        raise DataError(f"prepared data {folder}", "it is not there", "run: mhmoe data prepare SPEC")
    return manifest


def prepared_for(spec: RunSpec) -> DataManifest:
    """The manifest of a spec's prepared folder.

    Raises:
        DataError: there is none, or it was made with other settings than the spec's.
    """
    manifest = require_data_manifest(spec.data.prepared)
    check_recipe(spec.data.prepared, manifest, spec)
    return manifest


def check_recipe(folder: Path, manifest: DataManifest, spec: RunSpec) -> None:
    """The folder was made with the settings of this spec, and from the same text, which may have been moved.

    Raises:
        DataError: it was not; the first differing setting is named.
    """
    for key, wanted in recipe(spec).items():
        made = manifest.recipe.get(key)
        if made != wanted and not (key == "sources" and _is_same_text(manifest, spec)):
            why = f"it was made with {key} = {made}, and the spec says {wanted}"
            raise DataError(f"prepared data {folder}", why, "set data.prepared to another folder, or remove this one")
