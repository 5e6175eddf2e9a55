"""The data manifest of a folder of prepared shards; it is written last, so a folder with a manifest is complete.

<prepared>/
  train/<domain>/00000.arrow ...   packed samples, with the columns of columns.py
  train/<domain>/00000.arrow.documents   the index of their documents, which the manifest does not list
  validation/00000.arrow           the held-out samples, domain by domain
  tokenizer.json  quarantine.jsonl  manifest.json
  chat_template.jinja              the template of the conversations, if a source has any
  codebook.npy                     the codebook of an encoder, if its `image_targets` is `codebook`
  classes.json                     the names of the classes of each task of a vision model, in place of tokenizer.json
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, SerializerFunctionWrapHandler, TypeAdapter, ValidationError, model_serializer

from mhmoe_ray.errors import DataError
from mhmoe_ray.parsing import parse_json
from mhmoe_ray.storage import Location, ObjectPath, describe_file, explain_error, read_file

MANIFEST_FILE = "manifest.json"
QUARANTINE_FILE = "quarantine.jsonl"
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
CODEBOOK_FILE = "codebook.npy"
CLASSES_FILE = "classes.json"
PUBLISHING_PREFIX = "publishing-"
"""Start of the name of an object by which a job announces that it publishes its result in this folder."""


class Shard(BaseModel):
    """Manifest entry of a shard file."""

    file: str
    """Path below the prepared folder."""
    rows: int
    """Number of samples."""
    sha256: str


class _KindAware(BaseModel):
    """Base class of manifest models that leave out unset fields about conversations and images."""

    @model_serializer(mode="wrap")
    def _leave_out_unset_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Checkpoints identify their data by a hash of the manifest, so the manifest of a folder of text must stay
        # without these keys.
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if value is not None or key not in _KIND_FIELDS}


_KIND_FIELDS = {"target_tokens", "chat", "images", "image_bytes", "encoder", "vision"}


class Domain(_KindAware):
    """Manifest entry of a domain: its counts and shards."""

    documents: int
    """Number of training documents."""
    validation_documents: int
    """Number of held-out documents."""
    quarantined: dict[str, int]
    """Number of unreadable lines, table rows, files or lost parts of files, by reason."""
    dropped: dict[str, int]
    """Documents that the source's filters dropped, by rule."""
    text_bytes: int
    """UTF-8 bytes of the texts of all documents, training and held-out."""
    tokens: int
    """Tokens of the training documents, with a start token for each text."""
    validation_tokens: int
    """Tokens of all held-out documents, with start tokens; the selected samples may have fewer."""
    samples: int
    validation_samples: int
    """Held-out samples that were selected for the validation."""
    unused_tokens: int
    """Tokens after the last full sample with concatenation, fewer than a sample has; for an encoder, tokens cut from
    texts with images."""
    padding: int
    """Targets that are padding in samples without room for a document; for an encoder, padding tokens."""
    target_tokens: int | None = None
    """Targets in training samples that count in the loss, in conversations only the assistant's. None without
    conversations, where all targets except padding count."""
    cut_documents: int
    """Training documents of which no sample has the whole."""
    images: int | None = None
    """Training samples with an image; None for a decoder."""
    image_bytes: int | None = None
    """Bytes of these samples' stored images; None for a decoder."""
    shards: list[Shard]

    @property
    def size(self) -> int:
        """Size by which domains share their source's weight: tokens, or samples if the folder has images."""
        return self.tokens if self.images is None else self.samples


class Baselines(BaseModel):
    """Validation losses of simple models in nats per token."""

    unigram_entropy: float
    """Entropy of the validation tokens: the lowest loss of any model without context."""
    bigram: float
    """Cross-entropy of a bigram model with Witten-Bell smoothing, counted on training tokens."""
    bigram_tokens: int
    """Training tokens on which the bigram model was counted."""


class ChatData(BaseModel):
    """Facts about the conversations in a prepared folder."""

    template_sha256: str
    start_token: int
    """Token that precedes each document."""
    turn_ends: list[int]
    """Tokens that end a turn of the assistant."""


class EncoderData(BaseModel):
    """Facts about a prepared folder for an encoder."""

    codebook_sha256: str | None = None
    """None if the encoder has no codebook."""
    classes_sha256: str | None = None
    """None if the encoder answers no questions."""

    @property
    def files(self) -> dict[str, str | None]:
        """Hashes of the family's files; None for a missing one."""
        return {CODEBOOK_FILE: self.codebook_sha256, CLASSES_FILE: self.classes_sha256}


class VisionData(BaseModel):
    """Facts about a prepared folder for a vision model."""

    classes_sha256: str

    @property
    def files(self) -> dict[str, str | None]:
        """Hashes of the family's files."""
        return {CLASSES_FILE: self.classes_sha256}


class DataManifest(_KindAware):
    """Data manifest of a prepared folder: its recipe, counts and shards."""

    recipe: dict[str, Any]
    """Settings that determine the content of the folder, from the function `recipe`."""
    fingerprints: dict[str, str] = {}
    """Fingerprint of each local source (`data/sources/find.py`), by which moved text is recognised."""
    seq_len: int
    token_bytes: int
    """2 or 4; tokens are little-endian unsigned integers."""
    tokenizer_sha256: str | None
    """None for a vision model."""
    chat: ChatData | None = None
    encoder: EncoderData | None = None
    vision: VisionData | None = None
    domains: dict[str, Domain]
    validation: list[Shard]
    validation_tokens: int
    """Targets in `validation` that count in the loss; for an encoder, tokens of texts without start tokens; for a
    vision model, samples. The field of that name in `domains` counts all held-out tokens."""
    baselines: Baselines | None
    """None if the folder has no texts, or has pairs."""
    bad_lines: int
    """All items in the quarantine, with lost parts of files, which `Tally.bad_lines` leaves out."""

    @property
    def shards(self) -> list[Shard]:
        """All shards, those of the validation last."""
        return [*(shard for domain in self.domains.values() for shard in domain.shards), *self.validation]

    @property
    def shard_bytes(self) -> int:
        """Approximate bytes of all shards."""
        # A conversation has two bits for each token besides the token.
        row_bytes = (self.seq_len + 1) * (self.token_bytes + (self.chat is not None) / 4)
        images = sum(domain.image_bytes or 0 for domain in self.domains.values())
        return round(sum(shard.rows for shard in self.shards) * row_bytes) + images

    @property
    def files(self) -> dict[str, str | None]:
        """Hashes of all files besides shards and the manifest; None for a missing one."""
        facts = self.encoder or self.vision
        template_sha256 = self.chat.template_sha256 if self.chat else None
        files = {TOKENIZER_FILE: self.tokenizer_sha256, TEMPLATE_FILE: template_sha256}
        return files | (facts.files if facts else {})


def read_classes(file: Location) -> dict[str, list[str]]:
    """Return each task's class names by number; an unreadable file is a DataError."""
    try:
        return TypeAdapter(dict[str, list[str]]).validate_python(parse_json(read_file(file)))
    except (OSError, ValueError) as e:
        reason = "it is damaged" if isinstance(e, ValidationError) else str(e)
        raise DataError(f"names of classes {file}", reason, "prepare the data again, or restore the run") from e


def read_data_manifest(folder: Location) -> DataManifest | None:
    """Read the data manifest of a prepared folder, or return None without the folder.

    A folder without a readable manifest is a DataError. On an object store, one that a job is publishing is not there
    yet.
    """
    subject, fix = f"prepared data {folder}", "set data.prepared to another folder, or remove this one"
    try:
        if not folder.exists():
            if isinstance(folder, ObjectPath):
                folder.require_bucket()
            return None
        content = read_file(folder / MANIFEST_FILE)
    except FileNotFoundError as e:
        if isinstance(folder, ObjectPath) and next(folder.glob(f"{PUBLISHING_PREFIX}*"), None):
            return None
        raise DataError(subject, "it has no manifest.json", fix) from e
    except OSError as e:
        fix = "check its disk and permissions; the data may be intact"
        if isinstance(folder, ObjectPath):
            fix = "check the network, and the store's region and credentials"
        reason, fix = explain_error(e, fix)
        raise DataError(subject, f"its manifest.json cannot be read ({reason})", fix) from e
    try:
        return DataManifest.model_validate(parse_json(content))
    except ValueError as e:
        raise DataError(subject, "its manifest.json is damaged, or from another version", fix) from e


def data_digest(folder: Location) -> str:
    """Return the hash by which checkpoints identify the data that they were trained on.

    It leaves out the paths of sources with a fingerprint, so moving local text keeps it.
    """
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    # Folders of earlier versions have no fingerprints, so the hash of the whole manifest identifies their data.
    if not manifest.get("fingerprints"):
        return describe_file(folder / MANIFEST_FILE).sha256
    sources = manifest["recipe"]["sources"]
    manifest["recipe"]["sources"] = {k: path for k, path in sources.items() if k not in manifest["fingerprints"]}
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def require_matching_data(expected_digest: str | None, folder: Location, advice: str) -> None:
    """Raise DataError if a prepared folder is not the data that a checkpoint was trained on.

    `advice` ("or ...") is an alternative to restoring the folder.
    """
    if data_digest(folder) != expected_digest:
        fix = f"restore the folder that the run began with, {advice}"
        raise DataError(f"prepared data {folder}", "it is not what the checkpoint was trained on", fix)


def require_data_manifest(folder: Location) -> DataManifest:
    """Return the data manifest of a prepared folder, or raise DataError."""
    manifest = read_data_manifest(folder)
    if manifest is None:
        raise DataError(f"prepared data {folder}", "it is not there", "run: mhmoe data prepare SPEC")
    return manifest
