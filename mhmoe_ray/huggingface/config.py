"""config.json: of a Mixtral where the model is one, and always with our own `model` section, which says all.

    {"model_type": "mixtral" or "mhmoe", ..., "mhmoe": {"model": {...}, "seq_len": 2048, "tokenizer_sha256": "..."}}

Tools that know Mixtral read its fields and pass over ours; a folder that never was ours has no `mhmoe`, and its fields
become a `model` section. Where both are there they must agree.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, PositiveInt, ValidationError

from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.huggingface.mixtral import MixtralConfig, is_mixtral
from mhmoe_ray.spec import ModelSpec

CONFIG, GENERATION = "config.json", "generation_config.json"
OURS = "mhmoe"


class MhmoeConfig(BaseModel):
    """What config.json holds under `mhmoe`."""

    model: ModelSpec
    seq_len: PositiveInt
    tokenizer_sha256: str | None = None
    """Of the tokenizer.json beside it; absent in folders that were never ours."""


def to_config(
    model: ModelSpec, seq_len: int, dtype: torch.dtype, edges: tuple[int, list[int]], tokenizer_sha256: str
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        model: the section.
        seq_len: tokens that it sees at once.
        dtype: of its weights.
        edges: token ids that start and that end a text.
        tokenizer_sha256: of its tokenizer.json.
    """
    section = MhmoeConfig(model=model, seq_len=seq_len, tokenizer_sha256=tokenizer_sha256)
    ours = {OURS: section.model_dump(mode="json")}
    common = {"torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": edges[0], "eos_token_id": edges[1]}
    if not is_mixtral(model):
        return {"model_type": "mhmoe", **common, **ours}
    fields = MixtralConfig.of(model, seq_len).model_dump(exclude_unset=True)
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **fields, **common, **ours}


def read_config(folder: Path, seq_len: int | None) -> tuple[str, MhmoeConfig]:
    """The model type of a folder; its model, and the tokens that it is to see at once.

    Args:
        folder: with a config.json.
        seq_len: as asked for; by default as many as it was made for.

    Raises:
        CheckpointError: there is no config.json, or it asks for what we do not compute.
    """
    what = f"folder {folder}"
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = fields.get("model_type")
    except OSError as e:
        why = f"its {CONFIG} cannot be read ({e.strerror})"
        raise CheckpointError(what, why, "name the folder of a model, as `mhmoe ckpt export` writes it") from e
    except (ValueError, AttributeError) as e:
        raise CheckpointError(what, f"its {CONFIG} is damaged", "get the folder again") from e
    if kind != "mixtral" and (kind != "mhmoe" or OURS not in fields):
        why = f"its model_type is {kind}"
        raise CheckpointError(what, why, "import a Mixtral, or what `mhmoe ckpt export` wrote")
    try:
        config = MhmoeConfig.model_validate(fields[OURS]) if OURS in fields else None
        if kind == "mixtral":
            mixtral = MixtralConfig.model_validate(fields)
            config = _agreed(what, mixtral, config) if config else _as_ours(mixtral)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        why = f"{CONFIG}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        raise CheckpointError(what, why, "such a model cannot be imported") from e
    assert config is not None
    if seq_len is not None and seq_len > config.seq_len:
        why = f"it is made for {config.seq_len} tokens at once"
        raise CheckpointError(what, why, f"choose a --seq-len up to that, not {seq_len}")
    return kind, config if seq_len is None else config.model_copy(update={"seq_len": seq_len})


def named_ends(folder: Path, known: int) -> set[int]:
    """The token ids at which a text is over, as the folder's own files say. Where both say it, both count.

    Args:
        folder: whose config.json was read.
        known: ids of tokens are below it.

    Raises:
        CheckpointError: a file cannot be read, or names what is no token.
    """
    what, ends = f"folder {folder}", set[int]()
    for file in (folder / CONFIG, folder / GENERATION):
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as e:
            raise CheckpointError(what, f"its {file.name} cannot be read ({e})", "get the folder again") from e
        for token in named if isinstance(named, list) else [] if named is None else [named]:
            if type(token) is not int or not 0 <= token < known:
                why = f"the eos_token_id in its {file.name} is {named}, and its tokenizer has tokens 0 to {known - 1}"
                raise CheckpointError(what, why, "correct that file")
            ends.add(token)
    return ends


def _as_ours(mixtral: MixtralConfig) -> MhmoeConfig:
    return MhmoeConfig(model=mixtral.model(), seq_len=mixtral.positions)


def _agreed(what: str, mixtral: MixtralConfig, ours: MhmoeConfig) -> MhmoeConfig:
    """Our section, which also knows how it was trained, if nobody changed the other fields since."""
    if not is_mixtral(ours.model) or _as_ours(MixtralConfig.of(ours.model, ours.seq_len)) != _as_ours(mixtral):
        why = f"the section {OURS} of its {CONFIG} is not the model that the other fields are"
        raise CheckpointError(what, why, "remove that section if the others are right")
    return ours
