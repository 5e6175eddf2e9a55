"""Translation of config.json of dense decoders (Llama, Mistral, Qwen2 and Qwen3) to and from a spec."""

from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from mhmoe_ray.checkpoint.huggingface.adapters.base import Adapter
from mhmoe_ray.spec import ModelSpec


class DenseAdapter(Adapter):
    """Keys of config.json that the dense decoders share."""

    hidden_act: Literal["silu"] = "silu"
    intermediate_size: PositiveInt

    @classmethod
    def _fields_of(cls, model: ModelSpec) -> dict[str, Any] | None:
        if model.backbone != "llama" or model.moe is not None:
            return None
        return {"intermediate_size": model.d_ff}

    def to_model_spec(self) -> ModelSpec:
        return ModelSpec.model_validate({**self._trunk_options(), "d_ff": self.intermediate_size})


class LlamaAdapter(DenseAdapter):
    """Keys of config.json of Llama 1 to 3."""

    model_type = "llama"
    class_name = "LlamaForCausalLM"

    attention_bias: bool = False
    mlp_bias: Literal[False] = False
    # With a value above 1, transformers computes matrix products in slices, which give the same results.
    pretraining_tp: int | None = 1

    @classmethod
    def _fields_of(cls, model: ModelSpec) -> dict[str, Any] | None:
        fields = super()._fields_of(model)
        return None if fields is None else {**fields, "attention_bias": model.biased_attention == "all"}

    def _trunk_options(self) -> dict[str, Any]:
        return {**super()._trunk_options(), "attention_bias": "all" if self.attention_bias else "none"}


class MistralAdapter(DenseAdapter):
    """Keys of config.json of Mistral."""

    model_type = "mistral"
    class_name = "MistralForCausalLM"

    sliding_window: PositiveInt | None = 4096

    @classmethod
    def _fields_of(cls, model: ModelSpec) -> dict[str, Any] | None:
        fields = super()._fields_of(model)
        return None if fields is None else {**fields, "sliding_window": None}


class Qwen2Adapter(DenseAdapter):
    """Keys of config.json of Qwen2 and Qwen2.5, whose projections of queries, keys and values have biases."""

    model_type = "qwen2"
    class_name = "Qwen2ForCausalLM"

    use_sliding_window: bool = False
    sliding_window: PositiveInt | None = 4096
    biases: ClassVar[Literal["none", "qkv"]] = "qkv"

    @classmethod
    def _fields_of(cls, model: ModelSpec) -> dict[str, Any] | None:
        fields = super()._fields_of(model)
        return None if fields is None else {**fields, "use_sliding_window": False}

    def _trunk_options(self) -> dict[str, Any]:
        return {**super()._trunk_options(), "attention_bias": self.biases}


class Qwen3Adapter(Qwen2Adapter):
    """Keys of config.json of Qwen3, which normalizes each head of queries and keys, and has no biases by default."""

    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"

    head_dim: PositiveInt | None = 128
    attention_bias: bool = False

    @classmethod
    def _fields_of(cls, model: ModelSpec) -> dict[str, Any] | None:
        fields = super()._fields_of(model)
        return None if fields is None else {**fields, "attention_bias": model.biased_attention == "all"}

    def _trunk_options(self) -> dict[str, Any]:
        bias = "all" if self.attention_bias else "none"
        return {**super()._trunk_options(), "attention_bias": bias, "qk_norm": "head"}
