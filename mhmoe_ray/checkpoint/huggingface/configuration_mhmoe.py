"""Configuration of an MH-MoE model in transformers: the keys of config.json that decide what the model computes.

An export contains a copy of this file beside its copy of modeling_mhmoe.py. Both need only torch and transformers; they
were tested with transformers 5.16, 5.19 and 5.24.
"""

from typing import Any

from transformers import PreTrainedConfig


class MhmoeConfig(PreTrainedConfig):
    """Configuration of an MH-MoE model.

    Keys that Llama, Qwen3-MoE or DeepSeek-V3 have, too, have the same names here. In the descriptions, d is
    `hidden_size`, h is `moe_heads` and E is `num_experts`.
    """

    model_type = "mhmoe"

    backbone: str = "llama"
    """Architecture of the trunk. llama: RMSNorm, rotary positions, SwiGLU. subln: LayerNorm also inside attention and
    feed-forward layers, xPos, GELU, biases, embeddings scaled by sqrt(d)."""
    vocab_size: int = 32_000
    tokenizer_size: int | None = None
    """Number of tokens of the tokenizer; further embedding rows are unused."""
    hidden_size: int = 768
    intermediate_size: int | None = None
    """Hidden width of the dense feed-forward layers; None if every layer is a mixture of experts."""
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    """Epsilon of all norms, both RMSNorm and LayerNorm."""
    rope_parameters: dict[str, Any] | None = None
    attention_bias: str = "none"
    """Projections with a bias: none, qkv (queries, keys and values) or all (also the output)."""
    qk_norm: str = "none"
    """RMSNorm of queries and keys before rotation: none, head (each head by itself) or all (all heads together)."""
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    use_cache: bool = True

    num_experts: int = 0
    """E: number of experts of a layer; 0 for a dense model."""
    num_experts_per_tok: int = 2
    """Number of experts of each sub-token."""
    moe_intermediate_size: int | None = None
    decoder_sparse_step: int = 1
    """Layer i (from 0) is a mixture of experts if i + 1 is a multiple of this number."""
    first_k_dense_replace: int = 0
    """Number of first layers that are dense, regardless of `decoder_sparse_step`."""
    moe_heads: int = 1
    """h: number of sub-tokens that a token is split into."""
    sub_token_size: int | None = None
    """Width of a sub-token; None for d / h. With another width, the first layer of the head projection and the last
    layer of the merge projection change the width of a token."""
    head_projection_layers: int = 0
    """Number of linear layers before the split into sub-tokens, with ReLU between them; 0 for none."""
    merge_projection_layers: int = 0
    """Number of linear layers after sub-tokens are joined, with ReLU between them; 0 for none."""
    sub_token_residual: bool = False
    shared_expert_intermediate_size: int = 0
    """Hidden width of the shared expert, which computes on whole tokens; 0 for none."""

    router_type: str = "linear"
    """Kind of router: linear, xmoe (X-MoE's router as published) or xmoe_torchscale (as torchscale computes it)."""
    router_dim: int | None = None
    """Width to which X-MoE's routers project a sub-token; None for router linear."""
    scoring_func: str = "softmax"
    """Function from logits to scores: softmax over the experts, or sigmoid for each expert by itself."""
    norm_topk_prob: bool = False
    """If true, the gates of a sub-token are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor of all gates."""
    n_group: int = 1
    """Number of groups of experts, of which a sub-token considers only the best `topk_group`."""
    topk_group: int = 1
    router_bias: bool = False
    """If true, the choice of experts, but not the gates, adds a bias to the scores."""
    router_jitter_noise: float = 0.0
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0
    """Factor of the load balancing loss, summed over layers."""
    router_z_loss_coef: float = 0.0
    """Factor of the mean squared log-sum-exp of the router's logits, summed over layers."""
    balance_choices: str = "first"
    """Choices that the load balancing loss counts: the first one of each sub-token, or all."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
        super().__post_init__(**kwargs)

    @property
    def row_width(self) -> int:
        """The width of a sub-token."""
        return self.sub_token_size or self.hidden_size // self.moe_heads

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, is a mixture of experts."""
        is_sparse = self.num_experts > 0 and layer >= self.first_k_dense_replace
        return is_sparse and (layer + 1) % self.decoder_sparse_step == 0
