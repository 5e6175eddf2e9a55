"""Mixtral's configuration and the `model` section that computes the same."""

from typing import Any, Self

from pydantic import BaseModel, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec import ModelSpec, MoESpec


class MixtralConfig(BaseModel):
    """The fields of a Mixtral's config.json that say what it computes."""

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
        """transformers 5 keeps it among `rope_parameters`."""
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
        """Tokens that it sees at once. Up to a sliding window, attention with one is attention without."""
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
    """Whether it computes exactly what Mixtral does of one text; masks between documents matter in training alone."""
    moe = model.moe
    if moe is None or model.backbone != "llama" or model.moe_layers != model.layers:
        return False
    plain = moe.heads == 1 and not (moe.has_head or moe.has_merge or moe.sub_token_residual or moe.d_shared)
    routed = moe.router == "linear" and moe.normalize_gates and not moe.bias_rate and moe.capacity_factor is None
    return plain and routed
