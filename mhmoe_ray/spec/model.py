"""The `model` section: a LLaMA-like decoder with (multi-head) mixture-of-experts layers.

Sizes use the papers' names: d (`d_model`), h (`moe.heads`), E (`moe.experts`), k (`moe.top_k`), f (`moe.d_expert`).
"""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section


class MoESpec(Section):
    """A mixture-of-experts layer; `heads: 1` is the plain sparse mixture of experts (SMoE)."""

    heads: PositiveInt = 2
    """h: sub-tokens per token. Above 1, a head and a merge projection surround the experts."""
    experts: PositiveInt = 8
    """E: routed experts in each layer."""
    top_k: PositiveInt = 2
    """k: experts that each sub-token goes to."""
    d_expert: PositiveInt
    """f: hidden width of one expert."""
    every: PositiveInt = 2
    """Layer i (from 0) is a mixture of experts when (i + 1) is a multiple of this."""
    normalize_gates: bool = False
    """Divide the k routing weights by their sum (the first paper) or leave raw softmax weights (the follow-up)."""
    balance_weight: float = Field(default=0.01, ge=0)
    """Factor of the balance loss, summed over layers; a uniform router costs exactly this much per layer."""
    kernel: Literal["grouped", "reference"] = "grouped"
    """How routed rows go through the experts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts")
        return self


class ModelSpec(Section):
    vocab_size: PositiveInt
    """Rows of the (tied) embedding; a tokenizer trained by `data prepare` gets at most this many entries."""
    d_model: PositiveInt
    layers: PositiveInt
    attention_heads: PositiveInt
    d_ff: PositiveInt
    """Hidden width of the dense SwiGLU feed-forward layers."""
    rope_theta: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-5
    moe: MoESpec | None = None
    """Absent: every layer is dense."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % (2 * self.attention_heads):
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of twice attention_heads ({self.attention_heads}), "
                "because rotary positions need an even width per head"
            )
        if self.moe and self.d_model % self.moe.heads:
            raise ValueError(f"d_model {self.d_model} does not split into {self.moe.heads} equal sub-tokens")
        if self.moe and not self.moe_layers:
            raise ValueError(f"moe.every is {self.moe.every}, so none of the {self.layers} layers has experts")
        return self

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (counted from 0) is a mixture of experts."""
        return self.moe is not None and (layer + 1) % self.moe.every == 0

    @property
    def moe_layers(self) -> int:
        return sum(self.is_moe_layer(i) for i in range(self.layers))
