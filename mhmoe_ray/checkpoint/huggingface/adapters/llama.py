"""Translation of config.json of dense decoders (Llama, Mistral, Qwen2 and Qwen3) to and from a spec."""

from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from mhmoe_ray.checkpoint.huggingface.adapters.base import Adapter
from mhmoe_ray.spec import ModelSpec


class DenseAdapter(Adapter):
    """Keys of config.json that the dense decoders share."""

    model_keys: ClassVar = {"intermediate_size": "d_ff"}

    hidden_act: Literal["silu"] = "silu"
    intermediate_size: PositiveInt

    @classmethod
    def _may_express(cls, model: ModelSpec) -> bool:
        return model.backbone == "llama" and model.moe is None


class LlamaAdapter(DenseAdapter):
    """Keys of config.json of Llama 1 to 3."""

    model_type = "llama"
    class_name = "LlamaForCausalLM"
    model_keys: ClassVar = {**DenseAdapter.model_keys, "attention_bias": "attention_bias"}
    has_bias_switch = True

    attention_bias: bool = False
    mlp_bias: Literal[False] = False
    # With a value above 1, transformers computes matrix products in slices, which give the same results.
    pretraining_tp: int | None = 1


class MistralAdapter(DenseAdapter):
    """Keys of config.json of Mistral."""

    model_type = "mistral"
    class_name = "MistralForCausalLM"

    sliding_window: PositiveInt | None = 4096

    @classmethod
    def _special_fields(cls, model: ModelSpec) -> dict[str, Any]:
        return {"sliding_window": None}


class Qwen2Adapter(DenseAdapter):
    """Keys of config.json of Qwen2 and Qwen2.5, whose projections of queries, keys and values have biases."""

    model_type = "qwen2"
    class_name = "Qwen2ForCausalLM"
    fixed_options: ClassVar = {"attention_bias": "qkv"}

    use_sliding_window: bool = False
    sliding_window: PositiveInt | None = 4096

    @classmethod
    def _special_fields(cls, model: ModelSpec) -> dict[str, Any]:
        return {"use_sliding_window": False}


class Qwen3Adapter(Qwen2Adapter):
    """Keys of config.json of Qwen3, which normalizes each head of queries and keys, and has no biases by default."""

    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"
    model_keys: ClassVar = {**DenseAdapter.model_keys, "attention_bias": "attention_bias"}
    has_bias_switch = True
    fixed_options: ClassVar = {"qk_norm": "head"}

    head_dim: PositiveInt | None = 128
    attention_bias: bool = False
