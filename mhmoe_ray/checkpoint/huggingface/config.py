"""config.json and generation_config.json of a folder in Hugging Face's layout.

config.json has the keys of one architecture of transformers (`adapters/`), which decide what the model computes. An
exported folder also has a section `mhmoe` with the complete model section of the spec, so that a run that is imported
from it keeps the settings of its training:

    {"model_type": "llama", "hidden_size": 512, ..., "mhmoe": {"model": {...}, "seq_len": 2048, ...}}

Other tools ignore the section. If it describes another model than the keys, the folder is refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from mhmoe_ray.checkpoint.huggingface.adapters import ADAPTERS, choose_adapter, computed_function
from mhmoe_ray.checkpoint.huggingface.foreign import FOREIGN_TYPES, ForeignCounts, ForeignModel
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.parsing import ParseError, parse_object
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.base import TokenCount
from mhmoe_ray.storage import read_file

CONFIG, GENERATION = "config.json", "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
SECTION = "mhmoe"
# Key that shows that config.json has the keys of an architecture. Exports of version 0.1 have only the section `mhmoe`.
FIRST_KEY = "hidden_size"

AUTO_CLASSES = {
    "AutoConfig": "configuration_mhmoe.MhmoeConfig",
    "AutoModel": "modeling_mhmoe.MhmoeModel",
    "AutoModelForCausalLM": "modeling_mhmoe.MhmoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mhmoe.MhmoeForSequenceClassification",
}
"""Classes in an exported folder's code, by the auto classes of transformers that load them (`auto_map`)."""


class ExportResult(NamedTuple):
    """Result of the export of a checkpoint to a folder in Hugging Face's layout."""

    model_type: str
    """`model_type` in the folder's config.json."""
    tensors: int
    """Number of exported tensors."""
    bytes: int
    """Size of the exported tensors in bytes."""
    checkpoint: str
    """Name of the exported checkpoint."""
    base: str | None = None
    """Folder or model of the hub that an exported adapter adapts; None for a whole model."""


class MhmoeSection(BaseModel):
    """Section `mhmoe` of config.json: the complete description of the model."""

    model: ModelSpec
    seq_len: TokenCount
    """Context length in tokens."""
    tokenizer_sha256: str | None = None
    """Hash of the parts of tokenizer.json that encode text (`tokenizer_identity`); in older folders, of the whole file.
    None in folders of other tools."""
    adds_start: bool | None = True
    """Whether a start token precedes each text; None in folders of other tools, where the tokenizer decides."""


class PlannedModel(NamedTuple):
    """Model that config.json describes, for a plan."""

    model: ModelSpec
    context_length: int
    counts: ForeignCounts | None
    """Exact counts of the original if `model` is only similar to it."""


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder has an adapter in PEFT's layout."""
    return (folder / ADAPTER_CONFIG).is_file()


def build_config(model: ModelSpec, seq_len: int, tokenizer_size: int) -> dict[str, Any]:
    """Return the keys of config.json that decide what a model computes, with the names of its type and classes."""
    adapter = choose_adapter(model, seq_len)
    fields: dict[str, Any] = {"architectures": [adapter.class_name], "model_type": adapter.model_type}
    if adapter.model_type == SECTION:
        fields |= {"auto_map": AUTO_CLASSES, "tokenizer_size": tokenizer_size}
    return fields | adapter.model_dump(exclude_unset=True)


def read_config(folder: Path, seq_len: int | None) -> tuple[str, MhmoeSection]:
    """Return the model type in a folder's config.json, and its `mhmoe` section with the requested context length.

    The keys of the architecture give the section if another tool wrote the file. A file that cannot be read, a model
    that this package does not compute, or a `seq_len` above the model's context length is a CheckpointError.
    """
    subject, fields = f"folder {folder}", _read_fields(folder)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in ADAPTERS:
        reason = f"its model_type is {model_type}"
        raise CheckpointError(subject, reason, f"import one of {', '.join(ADAPTERS)}")
    try:
        section = _read_section(subject, model_type, fields)
    except (ValidationError, ValueError) as e:
        raise CheckpointError(subject, f"{CONFIG}: {error_text(e)}", "such a model cannot be imported") from e
    if seq_len is not None and seq_len > section.seq_len:
        reason = f"it is made for {section.seq_len} tokens at once"
        raise CheckpointError(subject, reason, f"choose a sequence length up to that, not {seq_len}")
    return model_type, section if seq_len is None else section.model_copy(update={"seq_len": seq_len})


def read_planned_model(folder: Path) -> PlannedModel:
    """Return the model that a folder's config.json describes, or the most similar one that can be planned.

    A file that cannot be read, or a model that cannot be planned, is a CheckpointError that names the wrong keys.
    """
    subject, fields = f"folder {folder}", _read_fields(folder)
    model_type = fields.get("model_type")
    if model_type not in FOREIGN_TYPES:
        known_types = ", ".join([*ADAPTERS, *FOREIGN_TYPES])
        if model_type not in ADAPTERS:
            raise CheckpointError(subject, f"its model_type is {model_type}", f"plan one of {known_types}")
        _, section = read_config(folder, None)
        return PlannedModel(section.model, section.seq_len, None)
    try:
        foreign = ForeignModel.model_validate(fields)
        return PlannedModel(foreign.similar_model(), foreign.max_position_embeddings, foreign.counts())
    except ValidationError as e:
        raise CheckpointError(subject, f"{CONFIG}: {error_text(e)}", "such a model cannot be planned") from e


def _read_fields(folder: Path) -> dict[str, Any]:
    subject = f"folder {folder}"
    try:
        return parse_object(read_file(folder / CONFIG))
    except OSError as e:
        reason = f"its {CONFIG} cannot be read ({e.strerror})"
        if is_adapter_folder(folder):
            reason, fix = "it is an adapter, not a model", f"merge it into its base: mhmoe ckpt import {folder}"
            raise CheckpointError(subject, reason, fix) from e
        raise CheckpointError(subject, reason, "name the folder of a model, as `mhmoe ckpt export` writes it") from e
    except ParseError as e:
        raise CheckpointError(subject, f"its {CONFIG} is damaged", "get the folder again") from e


def _read_section(subject: str, model_type: str, fields: dict[str, Any]) -> MhmoeSection:
    """Return the `mhmoe` section of config.json, or one made from the other keys.

    Keys of a model that is not computed here are a ValueError; a section that contradicts the keys is a
    CheckpointError.
    """
    section = MhmoeSection.model_validate(fields[SECTION]) if SECTION in fields else None
    if section is not None and FIRST_KEY not in fields:
        return section
    adapter = ADAPTERS[model_type].model_validate(fields)
    model = adapter.to_model_spec()
    if section is None:
        return MhmoeSection(model=model, seq_len=adapter.context_length, adds_start=None)
    # The section `mhmoe` is returned rather than the model that the other keys describe, because it also has the
    # settings of the training.
    if computed_function(section.model) != computed_function(model) or section.seq_len != adapter.context_length:
        reason = f"the section {SECTION} of its {CONFIG} is not the model that the other keys describe"
        raise CheckpointError(subject, reason, "remove that section if the other keys are right")
    return section


def error_text(error: Exception) -> str:
    """Return an error about config.json in one line, with the wrong key if pydantic found it."""
    if not isinstance(error, ValidationError):
        return str(error)
    first_error = error.errors()[0]
    location = ".".join(map(str, first_error["loc"]))
    return f"{location + ': ' if location else ''}{first_error['msg'].removeprefix('Value error, ')}"


def read_end_tokens(folder: Path, token_count: int) -> set[int]:
    """Return the token ids that config.json and generation_config.json name as `eos_token_id`.

    A file that cannot be read, or an id outside of the tokenizer's `token_count` tokens, is a CheckpointError.
    """
    subject, end_tokens = f"folder {folder}", set[int]()
    for file in (folder / CONFIG, folder / GENERATION):
        try:
            token_ids = parse_object(read_file(file)).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as e:
            raise CheckpointError(subject, f"its {file.name} cannot be read ({e})", "get the folder again") from e
        for token in token_ids if isinstance(token_ids, list) else [] if token_ids is None else [token_ids]:
            # In JSON, `true` is not a number, but in Python it is an instance of int. So the type itself is compared.
            if type(token) is not int or not 0 <= token < token_count:
                reason = (
                    f"the eos_token_id in its {file.name} is {token_ids}, "
                    f"and its tokenizer has tokens 0 to {token_count - 1}"
                )
                raise CheckpointError(subject, reason, "correct that file")
            end_tokens.add(token)
    return end_tokens
