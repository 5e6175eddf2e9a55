"""Interface of an adapter, which translates a spec to and from config.json of one architecture of transformers."""

# Processes that compute nothing import adapters and must start quickly, so nothing here may import torch.

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.base import HeadCount, LayerCount, TokenCount, Width
from mhmoe_ray.spec.model import RopeScaling

NameReplacements = tuple[tuple[str, str], ...]
"""Pairs of texts: a part of a tensor's name in `names.py`, and an architecture's name for this part."""
# Keys of any config.json that do not change what a model computes for a text: tokens, dtype, files, generation, labels.
NEUTRAL_KEYS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "layer_types",
    "max_window_layers",
    "mhmoe",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_z_loss_coef",
    "sep_token_id",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

_TRUNK_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention_heads",
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
    "attention_dropout": "attention_dropout",
}
"""Keys of all decoders that are options of a `model` section, with the names of these options."""


def explicit_options(model: ModelSpec) -> dict[str, Any]:
    """Return all options of a `model` section; unset ones have the values that they stand for."""
    options = model.model_dump(mode="json")
    options |= {"kv_heads": model.n_kv_heads, "d_head": model.head_width, "attention_bias": model.biased_attention}
    if model.moe is not None:
        options["moe"] |= {
            "d_sub_token": model.row_width,
            "head_projection": model.moe.has_head_projection,
            "merge_projection": model.moe.has_merge_projection,
            "router_dim": None if model.moe.router == "linear" else model.moe.routing_width,
        }
    return options


class Adapter(BaseModel, ABC):
    """Keys of config.json that all decoders have, and their translation to and from the `model` section of a spec.

    A subclass is the adapter of one architecture. It adds the architecture's own keys with the defaults of
    transformers, which apply where a file omits a key.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    """Class in transformers that computes the architecture, for `architectures` in config.json."""
    default_theta: ClassVar[float] = 10_000.0
    """Base of the frequencies of rotary positions if config.json omits it."""
    name_replacements: ClassVar[NameReplacements] = ()
    model_keys: ClassVar[dict[str, str]] = {}
    """The architecture's own keys that are options of a `model` section, with the names of these options."""
    has_bias_switch: ClassVar[bool] = False
    """True if the key `attention_bias` is a bool: all projections of attention have biases, or none has."""
    moe_keys: ClassVar[dict[str, str]] = {}
    """Keys that are options of `model.moe`, with the names of these options."""
    fixed_options: ClassVar[dict[str, Any]] = {}
    """Options of a `model` section that all models of the architecture have."""

    vocab_size: TokenCount
    hidden_size: Width
    num_hidden_layers: LayerCount
    num_attention_heads: HeadCount
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: TokenCount
    rms_norm_eps: PositiveFloat = 1e-6
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_dropout: NonNegativeFloat = 0.0
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool = True

    @model_validator(mode="before")
    @classmethod
    def _unify_rope(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Move older keys for rotary positions to `rope_parameters`, as transformers 5 writes them."""
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            return fields
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        theta = rope.get("rope_theta", fields.get("rope_theta", cls.default_theta))
        unified = {**{k: v for k, v in rope.items() if k != "type"}, "rope_type": rope_type, "rope_theta": theta}
        other_fields = {k: v for k, v in fields.items() if k not in ("rope_scaling", "rope_theta")}
        return {**other_fields, "rope_parameters": unified}

    @model_validator(mode="after")
    def _check_unknown_keys(self) -> Self:
        """Raise ValueError for an unknown key that may change what the model computes."""
        for key, value in (self.model_extra or {}).items():
            # A key that switches something off, such as `mlp_bias: false`, does not change what the model computes.
            if key not in NEUTRAL_KEYS and value not in (None, False, [], {}):
                raise ValueError(f"{key} is {value!r}, which is not a key of a {self.model_type} that is computed here")
        return self

    @classmethod
    def from_model(cls, model: ModelSpec, seq_len: int) -> Self | None:
        """Return the config.json keys for a model; None if the architecture clearly cannot compute it.

        The caller checks that `to_model_spec` gives back the same model, so this method need not check every option.

        Args:
            model: `model` section of a spec.
            seq_len: number of tokens that the model sees at once.
        """
        if not cls._may_express(model):
            return None
        options = explicit_options(model)
        fields = {key: options[option] for key, option in {**_TRUNK_KEYS, **cls.model_keys}.items()}
        if cls.has_bias_switch:
            fields["attention_bias"] = fields["attention_bias"] == "all"
        if options["moe"] is not None:
            fields |= {key: options["moe"][option] for key, option in cls.moe_keys.items()}
        fields |= {
            "head_dim": model.head_width,
            "max_position_embeddings": seq_len,
            "rope_parameters": rope_parameters(model),
            **cls._special_fields(model),
        }
        return cls.model_validate(fields)

    @classmethod
    @abstractmethod
    def _may_express(cls, model: ModelSpec) -> bool:
        """Return False if the architecture clearly cannot compute a model."""

    @classmethod
    def _special_fields(cls, model: ModelSpec) -> dict[str, Any]:
        """Return a model's config.json keys that are not options under other names."""
        return {}

    def to_model_spec(self) -> ModelSpec:
        """Return the `model` section of a spec that describes the same model as these keys.

        Raises:
            ValueError: the keys describe something that this package does not compute.
        """
        return ModelSpec.model_validate(self._options())

    def _options(self) -> dict[str, Any]:
        """Return the options of the `model` section."""
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        is_default_width = head_dim * self.num_attention_heads == self.hidden_size
        options = {option: getattr(self, key) for key, option in {**_TRUNK_KEYS, **self.model_keys}.items()}
        if self.has_bias_switch:
            options["attention_bias"] = "all" if options["attention_bias"] else "none"
        return {
            **options,
            "d_head": None if is_default_width else head_dim,
            "rope_theta": (self.rope_parameters or {})["rope_theta"],
            "rope_scaling": _rope_scaling(self.rope_parameters or {}, self.max_position_embeddings),
            **self.fixed_options,
        }

    @property
    def context_length(self) -> int:
        """Number of tokens that the model sees at once."""
        # Up to the length of the sliding window, attention with the window equals attention without it.
        window = self.sliding_window if self.use_sliding_window else None
        return min(self.max_position_embeddings, window or self.max_position_embeddings)


def rope_parameters(model: ModelSpec) -> dict[str, Any]:
    """Return the value of `rope_parameters` in config.json, which describes a model's rotary positions."""
    scaling, theta = model.rope_scaling, {"rope_theta": model.rope_theta}
    if scaling is None:
        return {"rope_type": "default", **theta}
    fields: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor, **theta}
    if scaling.type == "linear":
        return fields
    fields["original_max_position_embeddings"] = scaling.original_length
    if scaling.type == "llama3":
        return {**fields, "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return fields if scaling.attention_factor is None else {**fields, "attention_factor": scaling.attention_factor}


def _rope_scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """Return the scaling that `rope_parameters` describes; ValueError for one that this package does not compute."""
    rope_type = rope["rope_type"]
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor"),
    }.get(rope_type)
    if names is None:
        raise ValueError(f"its positions are scaled ({rope_type}); default, linear, yarn and llama3 are computed")
    known_keys = {"rope_type", "rope_theta", "original_max_position_embeddings", *names}
    harmless = {"partial_rotary_factor": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None}
    for key, value in rope.items():
        if key not in known_keys and value is not None and harmless.get(key) != value:
            raise ValueError(f"rope_parameters: {key} is {value!r}, which is not computed here")
    if rope_type == "default":
        return None
    options = {name: rope[name] for name in names if rope.get(name) is not None}
    if rope_type != "linear":
        options["original_length"] = rope.get("original_max_position_embeddings") or max_positions
    return RopeScaling(type=rope_type, **options)
