"""Models of other architectures of transformers, for plans alone: exact counts, and the most similar model of ours.

A config.json of one of `FOREIGN_TYPES` can be planned but not imported. Its weights are counted from its keys. Times
and memory are those of a decoder with the same widths and numbers of layers and experts, and with as many weights in
attention.
"""

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from mhmoe_ray.spec import ModelSpec


class ForeignCounts(NamedTuple):
    """Exact counts of a model whose plan is an approximation."""

    parameters: int
    active_parameters: int
    """Parameters that a token uses."""
    cache_values: int
    """Values that a server keeps per token of context, in all layers."""


FOREIGN_TYPES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"attention": "latent"},
    "deepseek_v3": {"attention": "latent"},
    "kimi_k2": {"attention": "latent"},
    "glm4_moe": {"query_bias": "attention_bias"},
    # Each head has a sink, a learned logit to which no value belongs, and all layers but norms have biases.
    "gpt_oss": {"query_bias": True, "has_sinks": True, "has_biases": True, "dense_first": 0},
    "qwen2_moe": {"query_bias": True, "has_shared_gate": True, "dense_first": 0},
}
"""Properties that config.json does not state, by `model_type`."""


class ForeignModel(BaseModel):
    """Keys of config.json that decide the counts of a decoder with experts."""

    model_config = ConfigDict(frozen=True)

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt
    tie_word_embeddings: bool = False
    intermediate_size: PositiveInt
    moe_intermediate_size: PositiveInt | None = None
    n_routed_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    first_k_dense_replace: NonNegativeInt = 0
    n_shared_experts: NonNegativeInt | None = None
    shared_expert_intermediate_size: NonNegativeInt = 0
    attention_bias: bool = False
    qkv_bias: bool = True
    use_qk_norm: bool = False
    # Multi-head latent attention (arXiv 2405.04434) projects keys and values up from a latent, which the cache keeps.
    kv_lora_rank: PositiveInt = 512
    q_lora_rank: PositiveInt | None = None
    qk_nope_head_dim: PositiveInt = 128
    qk_rope_head_dim: PositiveInt = 64
    v_head_dim: PositiveInt = 128
    # Only models whose first layers alone lack experts are counted.
    decoder_sparse_step: PositiveInt = Field(default=1, le=1)
    mlp_only_layers: list[int] | None = Field(default=None, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _unify_expert_count(cls, fields: dict[str, Any]) -> dict[str, Any]:
        names = ("n_routed_experts", "num_local_experts", "num_experts")
        return fields | {"n_routed_experts": next((fields[name] for name in names if name in fields), None)}

    @property
    def _heads(self) -> tuple[int, int]:
        """Numbers of heads of queries, and of keys and values."""
        return self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads

    @property
    def _head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def _expert_width(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def _shared_width(self) -> int:
        return self.shared_expert_intermediate_size or (self.n_shared_experts or 0) * self._expert_width

    def counts(self) -> ForeignCounts:
        d, layers, traits = self.hidden_size, self.num_hidden_layers, FOREIGN_TYPES[self.model_type]
        has_biases = traits.get("has_biases", False)
        expert = 3 * d * self._expert_width + has_biases * (2 * self._expert_width + d)
        router = (d + has_biases) * self.n_routed_experts
        shared = 3 * d * self._shared_width + d * traits.get("has_shared_gate", False)
        dense_layers = self.first_k_dense_replace
        outside = self.vocab_size * d * (1 if self.tie_word_embeddings else 2) + d
        outside += layers * (self._attention_parameters() + 2 * d) + dense_layers * 3 * d * self.intermediate_size
        moe_layers = layers - dense_layers
        outside += moe_layers * (router + shared)
        cache = self.kv_lora_rank + self.qk_rope_head_dim if self._is_latent else 2 * self._heads[1] * self._head_width
        return ForeignCounts(
            outside + moe_layers * self.n_routed_experts * expert,
            outside + moe_layers * self.num_experts_per_tok * expert,
            layers * cache,
        )

    @property
    def _is_latent(self) -> bool:
        return FOREIGN_TYPES[self.model_type].get("attention") == "latent"

    def _attention_parameters(self) -> int:
        d, (heads, kv_heads), width = self.hidden_size, self._heads, self._head_width
        if self._is_latent:
            query_width = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
            latent = self.kv_lora_rank + self.qk_rope_head_dim
            if self.q_lora_rank is None:
                queries = d * query_width
            else:
                queries = self.q_lora_rank * (d + query_width + 1 + self.attention_bias)
            keys = (d + self.attention_bias) * latent + self.kv_lora_rank
            keys += self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
            return queries + keys + (heads * self.v_head_dim + self.attention_bias) * d
        traits, qkv_width = FOREIGN_TYPES[self.model_type], (heads + 2 * kv_heads) * width
        has_query_bias: bool = self.attention_bias if traits["query_bias"] == "attention_bias" else self.qkv_bias
        biases = has_query_bias * qkv_width + d * bool(traits.get("has_biases"))
        sinks = heads * bool(traits.get("has_sinks"))
        return d * (qkv_width + heads * width) + biases + sinks + 2 * width * self.use_qk_norm

    def similar_model(self) -> ModelSpec:
        """Return the decoder of this package that is planned in this model's place."""
        (heads, kv_heads), width = self._heads, self._head_width
        if self._is_latent:
            # Heads of the width of the values, one of which has the keys and values of all, have as many weights.
            width, kv_heads = self.v_head_dim, 1
            heads = max(1, round(self._attention_parameters() / (2 * self.hidden_size * width)) - 1)
        return ModelSpec.model_validate(
            {
                "vocab_size": self.vocab_size,
                "d_model": self.hidden_size,
                "layers": self.num_hidden_layers,
                "attention_heads": heads,
                "kv_heads": kv_heads,
                "d_head": width,
                "d_ff": self.intermediate_size if self.first_k_dense_replace else None,
                "tied_embeddings": self.tie_word_embeddings,
                "moe": {
                    "heads": 1,
                    "experts": self.n_routed_experts,
                    "top_k": self.num_experts_per_tok,
                    "d_expert": self._expert_width,
                    "d_shared": self._shared_width,
                    "every": 1,
                    "dense_first": self.first_k_dense_replace,
                    "normalize_gates": self.num_experts_per_tok > 1,
                },
            }
        )
