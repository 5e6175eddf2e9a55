"""config.json: that of a Mixtral where the model is one, and always with our own complete `model` section.

    {"model_type": "mixtral" or "mhmoe", ..., "mhmoe": {"model": {...}, "seq_len": 2048, "tokenizer_sha256": "..."}}

Tools that know Mixtral read its fields and ignore ours. A folder that this package did not write has no `mhmoe`, and
its Mixtral fields become a `model` section. Where both are present they must agree.
"""

import json
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.spec import ModelSpec, MoESpec


class MixtralConfig(BaseModel):
    """Fields of a Mixtral's config.json that determine what it computes."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt | None = None
    num_local_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    hidden_act: str = "silu"
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    max_position_embeddings: PositiveInt
    sliding_window: PositiveInt | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    router_aux_loss_coef: NonNegativeFloat = 0.0
    router_jitter_noise: NonNegativeFloat = 0.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _theta(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Take `rope_theta` from `rope_parameters`, where transformers 5 keeps it."""
        rope = fields.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            return {**fields, "rope_theta": rope["rope_theta"]}
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        rope = self.rope_scaling or self.rope_parameters or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if self.quantization_config:
            raise ValueError("quantization_config: its weights are quantised, and only floats are understood")
        if self.head_dim is not None and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(f"head_dim is {self.head_dim}; only hidden_size / num_attention_heads is computed")
        if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"its positions are scaled ({kind}); only plain rotary positions are computed")
        if self.attention_bias:
            raise ValueError("attention_bias is true; attention without biases is computed only")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act}; only silu is computed")
        return self

    @classmethod
    def of(cls, model: ModelSpec, seq_len: int) -> Self:
        assert model.moe is not None
        # transformers' loss adds up to k where ours is 1, and is a mean over layers, not a sum.
        coefficient = model.moe.balance_weight * model.layers / model.moe.top_k
        return cls(
            vocab_size=model.vocab_size,
            hidden_size=model.d_model,
            intermediate_size=model.moe.d_expert,
            num_hidden_layers=model.layers,
            num_attention_heads=model.attention_heads,
            num_key_value_heads=model.n_kv_heads,
            num_local_experts=model.moe.experts,
            num_experts_per_tok=model.moe.top_k,
            rms_norm_eps=model.norm_eps,
            rope_theta=model.rope_theta,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            max_position_embeddings=seq_len,
            tie_word_embeddings=model.tied_embeddings,
            router_aux_loss_coef=coefficient,
            router_jitter_noise=model.moe.jitter,
        )

    @property
    def positions(self) -> int:
        """Number of tokens that the model sees at once.

        It is at most the sliding window: up to that length, attention with a window is attention without one.
        """
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    def model(self) -> ModelSpec:
        coefficient = self.router_aux_loss_coef
        moe = MoESpec(
            heads=1,
            experts=self.num_local_experts,
            top_k=self.num_experts_per_tok,
            d_expert=self.intermediate_size,
            every=1,
            normalize_gates=True,
            jitter=self.router_jitter_noise,
            balance_weight=coefficient * self.num_experts_per_tok / self.num_hidden_layers,
            balance_choices="all" if coefficient else "first",
        )
        return ModelSpec(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            layers=self.num_hidden_layers,
            attention_heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            tied_embeddings=self.tie_word_embeddings,
            rope_theta=self.rope_theta,
            norm_eps=self.rms_norm_eps,
            moe=moe,
        )


def is_mixtral(model: ModelSpec) -> bool:
    """Return whether a model computes exactly what Mixtral does for one text; masks between documents matter in
    training only."""
    moe = model.moe
    if moe is None or not model.architecture.is_mixtral or model.moe_layers != model.layers:
        return False
    plain = moe.heads == 1 and not (moe.has_head or moe.has_merge or moe.sub_token_residual or moe.d_shared)
    routed = moe.router == "linear" and moe.normalize_gates and not moe.bias_rate and moe.capacity_factor is None
    return plain and routed


CONFIG, GENERATION = "config.json", "generation_config.json"
OURS = "mhmoe"


class MhmoeConfig(BaseModel):
    """Content of config.json under `mhmoe`."""

    model: ModelSpec
    seq_len: PositiveInt
    tokenizer_sha256: str | None = None
    """Result of `tokenizer_identity` for the tokenizer.json in the folder, or in older folders the file's hash; absent
    in folders that this package did not write."""


def to_config(
    model: ModelSpec, seq_len: int, dtype: torch.dtype, edges: tuple[int, list[int]], tokenizer_sha256: str
) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        model: `model` section of the spec.
        seq_len: number of tokens that the model sees at once.
        dtype: dtype of the weights.
        edges: token id that starts a text, and token ids that end one.
        tokenizer_sha256: identity of the tokenizer.
    """
    section = MhmoeConfig(model=model, seq_len=seq_len, tokenizer_sha256=tokenizer_sha256)
    ours = {OURS: section.model_dump(mode="json")}
    common = {"torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": edges[0], "eos_token_id": edges[1]}
    if not is_mixtral(model):
        return {"model_type": "mhmoe", **common, **ours}
    fields = MixtralConfig.of(model, seq_len).model_dump(exclude_unset=True)
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **fields, **common, **ours}


def read_config(folder: Path, seq_len: int | None) -> tuple[str, MhmoeConfig]:
    """Return the model type of a folder, and its model with the number of tokens that it is to see at once.

    Args:
        folder: folder with a config.json.
        seq_len: requested number of tokens; by default as many as the model was made for.

    Raises:
        CheckpointError: config.json cannot be read, it describes a model that this package does not compute, or
            `seq_len` is more than the model was made for.
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
    """Return the token ids that end a text, as config.json and generation_config.json say.

    Where both say it, both count.

    Args:
        folder: folder whose config.json was read.
        known: number of tokens; all token ids are below it.

    Raises:
        CheckpointError: a file cannot be read, or names an id that is no token.
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
    """Return our section, which also knows how the model was trained, if the other fields describe the same model.

    Raises:
        CheckpointError: the other fields describe another model, because somebody changed them.
    """
    if not is_mixtral(ours.model) or _as_ours(MixtralConfig.of(ours.model, ours.seq_len)) != _as_ours(mixtral):
        why = f"the section {OURS} of its {CONFIG} is not the model that the other fields are"
        raise CheckpointError(what, why, "remove that section if the others are right")
    return ours
