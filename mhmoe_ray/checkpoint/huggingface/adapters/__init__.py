"""Adapters, which translate the `model` section of a spec to and from config.json of architectures of transformers.

base.py      the interface, and the keys that all decoders have
llama.py     dense decoders: Llama, Mistral, Qwen2, Qwen3
mixture.py   mixtures of experts: Mixtral, Qwen3-MoE, OLMoE
mhmoe.py     the models of this package, with the classes of `modeling_mhmoe.py`

A checkpoint is exported with the first adapter of `ADAPTERS` that expresses its model exactly.
"""

from typing import Any

from pydantic import ValidationError

from mhmoe_ray.checkpoint.huggingface.adapters.base import Adapter, explicit_options
from mhmoe_ray.checkpoint.huggingface.adapters.llama import LlamaAdapter, MistralAdapter, Qwen2Adapter, Qwen3Adapter
from mhmoe_ray.checkpoint.huggingface.adapters.mhmoe import MhmoeAdapter
from mhmoe_ray.checkpoint.huggingface.adapters.mixture import MixtralAdapter, OlmoeAdapter, Qwen3MoeAdapter
from mhmoe_ray.spec import ModelSpec

ADAPTERS: dict[str, type[Adapter]] = {
    adapter.model_type: adapter
    for adapter in (
        LlamaAdapter,
        MistralAdapter,
        Qwen2Adapter,
        Qwen3Adapter,
        MixtralAdapter,
        Qwen3MoeAdapter,
        OlmoeAdapter,
        MhmoeAdapter,
    )
}
"""All adapters by the `model_type` of config.json."""

TRAINING_OPTIONS = {"dropout", "attention_dropout", "document_masks"}
MOE_TRAINING_OPTIONS = {
    "jitter",
    "noise",
    "capacity_factor",
    "second_expert",
    "balance",
    "balance_weight",
    "balance_choices",
    "balance_over",
    "z_weight",
    "kernel",
    "recompute",
}
"""Options of `model.moe` that do not change what a trained model computes."""


def computed_function(model: ModelSpec) -> dict[str, Any]:
    """Return the options that decide what a model computes for a text; equal for models that compute the same.

    Options that matter only in training are left out, and unset options have the values that they stand for.
    """
    options = explicit_options(model)
    moe_options = options.pop("moe")
    fields = {option: value for option, value in options.items() if option not in TRAINING_OPTIONS}
    if moe_options is None:
        return fields
    moe_fields = {option: value for option, value in moe_options.items() if option not in MOE_TRAINING_OPTIONS}
    # The rate at which training adapts the selection bias of a router matters only in training. But a router has this
    # bias only if the rate is above 0.
    moe_fields["bias_rate"] = moe_fields["bias_rate"] > 0
    return {**fields, "moe": moe_fields}


def choose_adapter(model: ModelSpec, seq_len: int) -> Adapter:
    """Return the first adapter in `ADAPTERS` that computes exactly the same as a model."""
    for adapter_class in ADAPTERS.values():
        try:
            adapter = adapter_class.from_model(model, seq_len)
            if adapter and computed_function(adapter.to_model_spec()) == computed_function(model):
                return adapter
        except ValidationError:
            # The keys of this architecture cannot express the model, so the next architecture is tried.
            continue
    raise AssertionError(f"the adapter of {MhmoeAdapter.model_type} cannot express {model}")


__all__ = ["ADAPTERS", "Adapter", "choose_adapter", "computed_function"]
