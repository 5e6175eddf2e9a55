"""The data manifest of a folder of prepared shards; it is written last, so a folder with a manifest is complete.

<prepared>/
  train/<domain>/00000.arrow ...   packed samples; texts have the column `tokens`, and conversations have two more
                                   columns (see columns.py); the samples of an encoder have `tokens` and `image`, and
                                   those of a vision model have `image` and `annotation` (see rows.py)
  validation/00000.arrow           the held-out samples, domain by domain
  tokenizer.json  quarantine.jsonl  manifest.json
  chat_template.jinja              the template of the conversations, if a source has any
  codebook.npy                     the codebook of an encoder, if its `image_targets` is `codebook`
  classes.json                     the names of the classes of each task of a vision model, in place of tokenizer.json
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

from mhmoe_ray.data.chat.template import read_template
from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.sources.find import find_files, fingerprints
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location, describe_file

# This is the version of the format of prepared folders. It is among the settings with which a spec is compared, so
# folders of another version are refused.
FORMAT = 3
_TOKENIZER_KEYS = {"tokenizer", "tokenizer_pattern", "tokenizer_model", "tokenizer_train_mb"}
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
CODEBOOK_FILE = "codebook.npy"
CLASSES_FILE = "classes.json"
# These keys of a source determine the documents that it yields.
_READING_KEYS = {"format", "text_field", "delimiter", "filters"}


class Shard(BaseModel):
    """Entry of a shard file in the manifest of a prepared folder."""

    file: str
    """Path of the file below the prepared folder."""
    rows: int
    """Number of samples in the shard."""
    sha256: str


class _KindAware(BaseModel):
    """Base class of models in the manifest that leave out fields about conversations and images if they are None."""

    @model_serializer(mode="wrap")
    def _leave_out_unset_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialize the fields; leave out a field about conversations or images if its value is None."""
        # Checkpoints identify their data by a hash of the manifest, so the manifest of a folder of text must stay
        # without these keys.
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if value is not None or key not in _KIND_FIELDS}


_KIND_FIELDS = {"target_tokens", "chat", "images", "image_bytes", "encoder", "vision"}


class Domain(_KindAware):
    """Entry of a domain (a subfolder of a source, such as redpajama/book) in the manifest: its counts and shards."""

    documents: int
    """Number of training documents."""
    validation_documents: int
    """Number of held-out documents."""
    quarantined: dict[str, int]
    """Number of lines, table rows, files or lost parts of files that could not be read, by reason."""
    dropped: dict[str, int]
    """Number of documents that the source's filters dropped, by the name of the rule."""
    text_bytes: int
    """UTF-8 bytes of the texts of all training and held-out documents."""
    tokens: int
    """Number of tokens of the training documents, including one start token for each text."""
    validation_tokens: int
    """Number of tokens of all held-out documents, including start tokens; the selected samples may have fewer."""
    samples: int
    """Number of training samples."""
    validation_samples: int
    """Number of held-out samples that were selected for the validation."""
    unused_tokens: int
    """Number of tokens after the last full sample, if packing is by concatenation; always fewer than a sample has. In a
    folder for an encoder, the number of tokens that were cut from texts with images."""
    padding: int
    """Number of targets that are padding, in samples that were filled up because no further document fits. In a folder
    for an encoder, the number of padding tokens."""
    target_tokens: int | None = None
    """Number of targets in the training samples that count in the loss: in conversations, the tokens of the
    assistant's turns. None in a folder without conversations, where all targets except padding count."""
    cut_documents: int
    """Number of training documents that were cut, so that no sample has the whole document."""
    images: int | None = None
    """Number of training samples with an image; None in a folder for a decoder."""
    image_bytes: int | None = None
    """Size in bytes of the stored images of these samples; None in a folder for a decoder."""
    shards: list[Shard]

    @property
    def size(self) -> int:
        """Size by which domains share the weight of their source: tokens, or samples if the folder has images."""
        return self.tokens if self.images is None else self.samples


class Baselines(BaseModel):
    """Validation losses of simple models without a neural network, in nats per token, as baselines for training."""

    unigram_entropy: float
    """Entropy of the frequencies of the validation tokens: the lowest loss of any model without context."""
    bigram: float
    """Cross-entropy of a bigram model with Witten-Bell smoothing, counted on training tokens."""
    bigram_tokens: int
    """Number of training tokens that the bigram model was counted on."""


class ChatData(BaseModel):
    """Facts about the conversations in a prepared folder."""

    template_sha256: str
    """SHA-256 of the file of the chat template."""
    start_token: int
    """Id of the token that precedes each document."""
    turn_ends: list[int]
    """Ids of the tokens that end a turn of the assistant."""


class EncoderData(BaseModel):
    """Facts about a prepared folder for an encoder."""

    codebook_sha256: str | None = None
    """SHA-256 of the file of the codebook; None if the encoder has none."""

    @property
    def files(self) -> dict[str, str | None]:
        """Hashes of the family's files in the folder; None for a missing one."""
        return {CODEBOOK_FILE: self.codebook_sha256}


class VisionData(BaseModel):
    """Facts about a prepared folder for a vision model."""

    classes_sha256: str
    """SHA-256 of the file with the names of the classes of each task."""

    @property
    def files(self) -> dict[str, str | None]:
        """Hashes of the family's files in the folder."""
        return {CLASSES_FILE: self.classes_sha256}


class DataManifest(_KindAware):
    """Manifest of a prepared folder: the settings of its preparation, its counts and its shards."""

    recipe: dict[str, Any]
    """Settings that determine the content of the folder, as the function `recipe` returns them."""
    fingerprints: dict[str, str] = {}
    """Fingerprint of each local source (see `data/sources/find.py`), by which moved text is recognised."""
    seq_len: int
    token_bytes: int
    """Bytes per token, 2 or 4; tokens are little-endian unsigned integers."""
    tokenizer_sha256: str | None
    """SHA-256 of the tokenizer's file; None in a folder for a vision model."""
    chat: ChatData | None = None
    """Facts about the conversations; None if no source has any."""
    encoder: EncoderData | None = None
    """Facts about the samples of an encoder; None if the folder is for another model."""
    vision: VisionData | None = None
    """Facts about the samples of a vision model; None if the folder is for another model."""
    domains: dict[str, Domain]
    validation: list[Shard]
    validation_tokens: int
    """Number of targets in the samples of `validation` that count in the loss. For an encoder, it is the number of
    tokens of the texts, without counting start tokens; for a vision model, the number of samples. The field of the same
    name in `domains` counts all held-out tokens."""
    baselines: Baselines | None
    """Baselines of the validation loss; None if the folder has no texts."""
    bad_lines: int
    """Number of all items in the quarantine. It includes lost parts of files, which `Tally.bad_lines` leaves out."""

    @property
    def files(self) -> dict[str, str | None]:
        """Hashes of all files of the folder besides shards and the manifest, by name; None for a missing one."""
        facts = self.encoder or self.vision
        template_sha256 = self.chat.template_sha256 if self.chat else None
        files = {TOKENIZER_FILE: self.tokenizer_sha256, TEMPLATE_FILE: template_sha256}
        return files | (facts.files if facts else {})


def recipe(spec: RunSpec) -> dict[str, Any]:
    """Return the settings of a spec that determine the content of its prepared folder.

    Raises:
        DataError: the given tokenizer or chat template cannot be read.
    """
    # The mixture is not among the settings, since it only affects reading. A tokenizer that was trained for one mixture
    # stays when the mixture changes.
    data = spec.data
    settings: dict[str, Any] = {
        "format": FORMAT,
        "sources": {name: str(source.path) for name, source in data.sources.items()},
        "subfolders": {name: subfolders for name in data.sources if (subfolders := data.named_subfolders(name))},
        "reading": {
            name: source.model_dump(mode="json", include=_READING_KEYS) for name, source in data.sources.items()
        },
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
    if data.chat_sources:
        digest = hashlib.sha256(read_template(data).encode()).hexdigest()
        settings["chat_template"] = f"a template of SHA-256 {digest}"
    data_of(spec.model).add_to_recipe(spec, settings)
    return settings


def read_classes(file: Location) -> dict[str, list[str]]:
    """Return the names of the classes of each task, in the order of their numbers, from a `classes.json`.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        classes: dict[str, list[str]] = json.loads(file.read_bytes())
    except (OSError, ValueError) as e:
        raise DataError(f"names of classes {file}", str(e), "prepare the data again, or restore the run") from e
    return classes


def _given_tokenizer(path: Path) -> str:
    """Return a text that identifies a given tokenizer by the content of its file, not by its path.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return _tokenizer_label(describe_file(path).sha256)
    except OSError as e:
        raise DataError(f"tokenizer {path}", e.strerror or str(e), "restore it, or correct data.tokenizer") from e


def _tokenizer_label(sha256: str | None) -> str:
    return f"a file of SHA-256 {sha256}"


def read_data_manifest(folder: Path) -> DataManifest | None:
    """Read the manifest of a prepared folder; return None if the folder does not exist.

    Raises:
        DataError: the folder exists, but its manifest is missing or cannot be read.
    """
    subject, fix = f"prepared data {folder}", "set data.prepared to another folder, or remove this one"
    try:
        if not folder.exists():
            return None
        content = (folder / "manifest.json").read_bytes()
    except FileNotFoundError as e:
        raise DataError(subject, "it has no manifest.json", fix) from e
    except OSError as e:
        reason = f"its manifest.json cannot be read ({e.strerror or e})"
        raise DataError(subject, reason, "check its disk and permissions; the data may be intact") from e
    try:
        return DataManifest.model_validate(json.loads(content))
    except ValueError as e:
        raise DataError(subject, "its manifest.json is damaged, or from another version", fix) from e


def data_digest(folder: Path) -> str:
    """Return the hash of a prepared folder by which checkpoints identify the data that they were trained on.

    It is a hash of the manifest without the paths of local sources, which have a fingerprint. It therefore stays the
    same when local text is moved.
    """
    manifest = json.loads((folder / "manifest.json").read_bytes())
    # Folders of earlier versions have no fingerprints, so the hash of the whole manifest identifies their data.
    if not manifest.get("fingerprints"):
        return describe_file(folder / "manifest.json").sha256
    sources = manifest["recipe"]["sources"]
    manifest["recipe"]["sources"] = {k: path for k, path in sources.items() if k not in manifest["fingerprints"]}
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


PreparedKey = tuple[Path, str]
"""Key of prepared data: the path of its folder, and the settings of its preparation as JSON."""


def _is_same_text(manifest: DataManifest, spec: RunSpec) -> bool:
    """Return whether the sources of a spec have the text that was prepared for a manifest, even if it was moved.

    A local source with another path has the same text if its fingerprint is equal. A source at a URI has the same text
    only if its path is equal.
    """
    manifest_sources, spec_sources = manifest.recipe["sources"], recipe(spec)["sources"]
    moved_sources = {name for name in spec_sources if manifest_sources.get(name) != spec_sources[name]}
    if manifest_sources.keys() != spec_sources.keys() or not moved_sources <= manifest.fingerprints.keys():
        return False
    if any("://" in spec.data.sources[name].path for name in moved_sources):
        return False
    try:
        current_fingerprints = fingerprints(spec.data, find_files(spec.data, moved_sources))
    # The text is missing, so it cannot be compared. The error message of `check_recipe` then names both paths.
    except DataError:
        return False
    return all(current_fingerprints.get(name) == manifest.fingerprints[name] for name in moved_sources)


def prepared_key(spec: RunSpec) -> PreparedKey:
    """Return a key that is equal for specs that read the same prepared data.

    A given tokenizer and a given chat template are identified by their paths, so their files are not read.
    """
    given_files = {"tokenizer": spec.data.tokenizer, "chat_template": spec.data.chat_template}
    data = spec.data.model_copy(update=dict.fromkeys(given_files))
    return spec.data.prepared, json.dumps(
        [recipe(spec.model_copy(update={"data": data})), *map(str, given_files.values())], sort_keys=True, default=str
    )


def require_matching_data(expected_digest: str | None, folder: Path, advice: str) -> None:
    """Check that a prepared folder has the data that a checkpoint was trained on.

    Args:
        expected_digest: the data digest in the checkpoint.
        folder: the prepared folder.
        advice: end of the error message that names an alternative to restoring the folder ("or ...").

    Raises:
        DataError: the folder has another digest.
    """
    if data_digest(folder) != expected_digest:
        fix = f"restore the folder that the run began with, {advice}"
        raise DataError(f"prepared data {folder}", "it is not what the checkpoint was trained on", fix)


def require_data_manifest(folder: Path) -> DataManifest:
    """Return the data manifest of a prepared folder, which must exist.

    Raises:
        DataError: the folder does not exist, or it has no readable manifest.
    """
    manifest = read_data_manifest(folder)
    if manifest is None:
        raise DataError(f"prepared data {folder}", "it is not there", "run: mhmoe data prepare SPEC")
    return manifest


def require_prepared_data(spec: RunSpec) -> DataManifest:
    """Return the data manifest of a spec's prepared folder, which must fit the spec.

    Raises:
        DataError: the folder is not prepared, or it was prepared with settings or text that differ from the spec.
    """
    manifest = require_data_manifest(spec.data.prepared)
    check_recipe(spec.data.prepared, manifest, spec)
    return manifest


def check_recipe(folder: Path, manifest: DataManifest, spec: RunSpec) -> None:
    """Check that a folder was prepared with the settings of a spec and from the same text, which may have been moved.

    Raises:
        DataError: a setting or the text differs; the message names the first difference.
    """
    # A run that starts from another run's model names a tokenizer, which the other run may have trained in this folder.
    # If the folder has the tokenizer that the spec names, the settings of tokenizers are not compared.
    spec_recipe = recipe(spec)
    has_same_tokenizer = spec_recipe["tokenizer"] == _tokenizer_label(manifest.tokenizer_sha256)
    for key, spec_value in spec_recipe.items():
        if has_same_tokenizer and key in _TOKENIZER_KEYS:
            continue
        # A source may have another path if its text was only moved.
        manifest_value = manifest.recipe.get(key)
        if manifest_value != spec_value and not (key == "sources" and _is_same_text(manifest, spec)):
            reason = f"it was made with {key} = {manifest_value}, and the spec says {spec_value}"
            raise DataError(
                f"prepared data {folder}", reason, "set data.prepared to another folder, or remove this one"
            )
