"""Content of config.json: the fields of a Mixtral if the model is one, and always the complete `model` section.

    {"model_type": "mixtral" or "mhmoe", ..., "mhmoe": {"model": {...}, "seq_len": 2048, "tokenizer_sha256": "..."}}

Tools for Mixtral models read its fields and ignore `mhmoe`. A folder that this package did not write has no `mhmoe`,
and its Mixtral fields become a `model` section. If both are present they must agree.
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
    def _take_rope_theta(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields with the `rope_theta` of `rope_parameters`, if it is there."""
        # transformers 5 writes it there, older versions write a field of its own.
        rope = fields.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            return {**fields, "rope_theta": rope["rope_theta"]}
        return fields

    @model_validator(mode="after")
    def _check_support(self) -> Self:
        """Raise ValueError if the fields describe a Mixtral that this package cannot compute."""
        rope = self.rope_scaling or self.rope_parameters or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if self.quantization_config:
            raise ValueError("quantization_config: its weights are quantised, and only floats are understood")
        if self.head_dim is not None and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(f"head_dim is {self.head_dim}; only hidden_size / num_attention_heads is computed")
        if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"its positions are scaled ({kind}); only plain rotary positions are computed")
        if self.attention_bias:
            raise ValueError("attention_bias is true; only attention without biases is computed")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act}; only silu is computed")
        return self

    @classmethod
    def from_model(cls, model: ModelSpec, seq_len: int) -> Self:
        """Return the fields of the Mixtral that computes the same as a model for which `is_mixtral` holds."""
        assert model.moe is not None
        # For a uniform load, the balance loss of transformers is top_k and ours is 1. Theirs is a mean over layers,
        # ours a sum.
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
    def context_length(self) -> int:
        """Number of tokens that the model sees at once."""
        # Up to the length of the sliding window, attention with the window equals attention without it.
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    def to_model_spec(self) -> ModelSpec:
        """Return the `model` section of a spec that computes the same as this Mixtral."""
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
    """Return whether a model computes, for a single text, exactly what a Mixtral of the same sizes computes."""
    # Document masks are not compared: they only matter in training, where a sample has several documents.
    moe = model.moe
    if moe is None or not model.architecture.is_mixtral or model.moe_layers != model.layers:
        return False
    has_plain_layers = moe.heads == 1 and not (
        moe.has_head_projection or moe.has_merge_projection or moe.sub_token_residual or moe.d_shared
    )
    has_mixtral_routing = (
        moe.router == "linear" and moe.normalize_gates and not moe.bias_rate and moe.capacity_factor is None
    )
    return has_plain_layers and has_mixtral_routing


CONFIG, GENERATION = "config.json", "generation_config.json"
SECTION = "mhmoe"


class MhmoeConfig(BaseModel):
    """Section `mhmoe` of config.json: the complete description of the model."""

    model: ModelSpec
    seq_len: PositiveInt
    """Number of tokens that the model sees at once."""
    tokenizer_sha256: str | None = None
    """Result of `tokenizer_identity` for the tokenizer.json in the folder, or the file's hash in older folders; absent
    in folders that this package did not write."""


def build_config(
    model: ModelSpec, seq_len: int, dtype: torch.dtype, edge_tokens: tuple[int, list[int]], tokenizer_sha256: str
) -> dict[str, Any]:
    """Return the content of config.json for an exported model, with the fields of a Mixtral if it is one.

    Args:
        model: `model` section of the spec.
        seq_len: number of tokens that the model sees at once.
        dtype: dtype of the weights.
        edge_tokens: token id that starts a text, and token ids that end one.
        tokenizer_sha256: identity of the tokenizer.
    """
    section = MhmoeConfig(model=model, seq_len=seq_len, tokenizer_sha256=tokenizer_sha256)
    our_fields = {SECTION: section.model_dump(mode="json")}
    common_fields = {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": edge_tokens[0],
        "eos_token_id": edge_tokens[1],
    }
    if not is_mixtral(model):
        return {"model_type": "mhmoe", **common_fields, **our_fields}
    fields = MixtralConfig.from_model(model, seq_len).model_dump(exclude_unset=True)
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **fields, **common_fields, **our_fields}


def read_config(folder: Path, seq_len: int | None) -> tuple[str, MhmoeConfig]:
    """Read a folder's config.json; return its model type, and its `mhmoe` section with the requested context length.

    If it has no `mhmoe` section, because another tool wrote it, the section is made from its Mixtral fields.

    Args:
        folder: folder with a config.json.
        seq_len: requested context length in tokens; by default that of the model.

    Raises:
        CheckpointError: config.json cannot be read, it describes a model that this package does not compute, or
            `seq_len` is larger than the model's context length.
    """
    subject = f"folder {folder}"
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except OSError as e:
        reason = f"its {CONFIG} cannot be read ({e.strerror})"
        raise CheckpointError(subject, reason, "name the folder of a model, as `mhmoe ckpt export` writes it") from e
    except (ValueError, AttributeError) as e:
        raise CheckpointError(subject, f"its {CONFIG} is damaged", "get the folder again") from e
    if model_type != "mixtral" and (model_type != "mhmoe" or SECTION not in fields):
        reason = f"its model_type is {model_type}"
        raise CheckpointError(subject, reason, "import a Mixtral, or a folder that `mhmoe ckpt export` wrote")
    try:
        config = MhmoeConfig.model_validate(fields[SECTION]) if SECTION in fields else None
        if model_type == "mixtral":
            mixtral = MixtralConfig.model_validate(fields)
            config = _require_agreement(subject, mixtral, config) if config else _to_mhmoe_config(mixtral)
    except ValidationError as e:
        first_error = e.errors()[0]
        location = ".".join(map(str, first_error["loc"]))
        reason = f"{CONFIG}: {location + ': ' if location else ''}{first_error['msg'].removeprefix('Value error, ')}"
        raise CheckpointError(subject, reason, "such a model cannot be imported") from e
    assert config is not None
    if seq_len is not None and seq_len > config.seq_len:
        reason = f"it is made for {config.seq_len} tokens at once"
        raise CheckpointError(subject, reason, f"choose a --seq-len up to that, not {seq_len}")
    return model_type, config if seq_len is None else config.model_copy(update={"seq_len": seq_len})


def read_end_tokens(folder: Path, token_count: int) -> set[int]:
    """Return the token ids that end a text: all that config.json and generation_config.json name as `eos_token_id`.

    Args:
        folder: folder whose config.json was read.
        token_count: number of tokens; all token ids are below it.

    Raises:
        CheckpointError: a file cannot be read, or names an id that is no token.
    """
    subject, end_tokens = f"folder {folder}", set[int]()
    for file in (folder / CONFIG, folder / GENERATION):
        try:
            token_ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as e:
            raise CheckpointError(subject, f"its {file.name} cannot be read ({e})", "get the folder again") from e
        for token in token_ids if isinstance(token_ids, list) else [] if token_ids is None else [token_ids]:
            # In JSON `true` is no token id, but in Python it is an instance of int.
            if type(token) is not int or not 0 <= token < token_count:
                reason = (
                    f"the eos_token_id in its {file.name} is {token_ids}, "
                    f"and its tokenizer has tokens 0 to {token_count - 1}"
                )
                raise CheckpointError(subject, reason, "correct that file")
            end_tokens.add(token)
    return end_tokens


def _to_mhmoe_config(mixtral: MixtralConfig) -> MhmoeConfig:
    return MhmoeConfig(model=mixtral.to_model_spec(), seq_len=mixtral.context_length)


def _require_agreement(subject: str, mixtral: MixtralConfig, our_config: MhmoeConfig) -> MhmoeConfig:
    """Return `our_config`, the `mhmoe` section of config.json, after checking that the Mixtral fields agree with it.

    Raises:
        CheckpointError: the Mixtral fields describe another model.
    """
    # The `mhmoe` section is preferred because it also has the settings of the training.
    if not is_mixtral(our_config.model) or _to_mhmoe_config(
        MixtralConfig.from_model(our_config.model, our_config.seq_len)
    ) != _to_mhmoe_config(mixtral):
        reason = f"the section {SECTION} of its {CONFIG} is not the model that the other fields describe"
        raise CheckpointError(subject, reason, "remove that section if the other fields are right")
    return our_config
