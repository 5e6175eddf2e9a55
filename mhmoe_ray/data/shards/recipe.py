"""The recipe of a prepared folder: the settings of a spec that determine its content."""

import hashlib
import json
from typing import Any

from mhmoe_ray.data.chat.template import read_template
from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.shards.manifest import DataManifest, require_data_manifest
from mhmoe_ray.data.sources.find import find_files, fingerprints
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location, describe_file

# This is the version of the format of prepared folders. It is among the settings with which a spec is compared, so
# folders of another version are refused.
FORMAT = 3
_TOKENIZER_KEYS = {"tokenizer", "tokenizer_pattern", "tokenizer_model", "tokenizer_train_mb"}
# These keys of a source determine the documents that it yields.
_READING_KEYS = {"format", "text_field", "delimiter", "filters"}
PreparedKey = tuple[Location, str]
"""Path of a prepared folder, and the settings of its preparation as JSON."""


def recipe(spec: RunSpec) -> dict[str, Any]:
    """Return the settings of a spec that determine the content of its prepared folder.

    An unreadable tokenizer or chat template is a DataError.
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


def _given_tokenizer(path: Location) -> str:
    try:
        return _tokenizer_label(describe_file(path).sha256)
    except OSError as e:
        raise DataError(f"tokenizer {path}", e.strerror or str(e), "restore it, or correct data.tokenizer") from e


def _tokenizer_label(sha256: str | None) -> str:
    return f"a file of SHA-256 {sha256}"


def prepared_key(spec: RunSpec) -> PreparedKey:
    """Return a key that is equal for specs that read the same prepared data.

    It has the paths of a given tokenizer and chat template, which are not read.
    """
    given_files = {"tokenizer": spec.data.tokenizer, "chat_template": spec.data.chat_template}
    data = spec.data.model_copy(update=dict.fromkeys(given_files))
    return spec.data.prepared, json.dumps(
        [recipe(spec.model_copy(update={"data": data})), *map(str, given_files.values())], sort_keys=True, default=str
    )


def require_prepared_data(spec: RunSpec) -> DataManifest:
    """Return the data manifest of a prepared folder that fits the spec, or raise DataError."""
    manifest = require_data_manifest(spec.data.prepared)
    check_recipe(spec.data.prepared, manifest, spec)
    return manifest


def check_recipe(folder: Location, manifest: DataManifest, spec: RunSpec) -> None:
    """Raise DataError for the first setting in which a folder differs from a spec; text may have moved."""
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


def _is_same_text(manifest: DataManifest, spec: RunSpec) -> bool:
    """Return whether a spec's sources have the text that was prepared.

    A local source with an equal fingerprint may have moved; a source at a URI may not.
    """
    manifest_sources, spec_sources = manifest.recipe.get("sources"), recipe(spec)["sources"]
    if not isinstance(manifest_sources, dict):
        return False
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
