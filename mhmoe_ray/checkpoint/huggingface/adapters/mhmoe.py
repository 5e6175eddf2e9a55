"""Translation of config.json of MH-MoE models (`configuration_mhmoe.MhmoeConfig`) to and from a spec."""

from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mhmoe_ray.architectures import ArchitectureName
from mhmoe_ray.checkpoint.huggingface.adapters.base import Adapter
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.moe import RouterName

BIAS_RATE = 0.001
"""`bias_rate` of an imported router with a selection bias (DeepSeek-V3's rate), for training only."""


class MhmoeAdapter(Adapter):
    """Keys of config.json of MH-MoE models, which express every decoder that can be exported."""

    model_type = "mhmoe"
    class_name = "MhmoeForCausalLM"

    backbone: ArchitectureName = "llama"
    tokenizer_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    hidden_act: Literal["silu", "gelu"] = "silu"
    rms_norm_eps: PositiveFloat = 1e-5
    attention_bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: Literal["none", "head", "all"] = "none"
    tie_word_embeddings: bool = True
    hidden_dropout: NonNegativeFloat = 0.0
    num_experts: NonNegativeInt = 0
    num_experts_per_tok: PositiveInt = 2
    moe_intermediate_size: PositiveInt | None = None
    decoder_sparse_step: PositiveInt = 1
    first_k_dense_replace: NonNegativeInt = 0
    moe_heads: PositiveInt = 1
    sub_token_size: PositiveInt | None = None
    head_projection_layers: NonNegativeInt = 0
    merge_projection_layers: NonNegativeInt = 0
    sub_token_residual: bool = False
    shared_expert_intermediate_size: NonNegativeInt = 0
    router_type: RouterName = "linear"
    router_dim: PositiveInt | None = None
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: PositiveFloat = 1.0
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    router_bias: bool = False
    router_jitter_noise: NonNegativeFloat = 0.0
    router_aux_loss_coef: NonNegativeFloat = 0.0
    router_z_loss_coef: NonNegativeFloat = 0.0
    balance_choices: Literal["first", "all"] = "first"

    @classmethod
    def _fields_of(cls, model: ModelSpec) -> dict[str, Any] | None:
        fields = {
            "backbone": model.backbone,
            "intermediate_size": model.d_ff,
            "hidden_act": "silu" if model.architecture.expert_function == "swiglu" else "gelu",
            "attention_bias": model.biased_attention,
            "qk_norm": model.qk_norm,
            "hidden_dropout": model.dropout,
        }
        moe = model.moe
        if moe is None:
            return fields
        return {
            **fields,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.d_expert,
            "decoder_sparse_step": moe.every,
            "first_k_dense_replace": moe.dense_first,
            "moe_heads": moe.heads,
            "sub_token_size": moe.d_sub_token,
            "head_projection_layers": moe.projection_layers * moe.has_head_projection,
            "merge_projection_layers": moe.projection_layers * moe.has_merge_projection,
            "sub_token_residual": moe.sub_token_residual,
            "shared_expert_intermediate_size": moe.d_shared,
            "router_type": moe.router,
            "router_dim": None if moe.router == "linear" else moe.routing_width,
            "scoring_func": moe.scoring,
            "norm_topk_prob": moe.normalize_gates,
            "routed_scaling_factor": moe.gate_scale,
            "n_group": moe.groups,
            "topk_group": moe.top_groups,
            "router_bias": moe.bias_rate > 0,
            "router_jitter_noise": moe.jitter,
            "router_aux_loss_coef": moe.balance_weight,
            "router_z_loss_coef": moe.z_weight,
            "balance_choices": moe.balance_choices,
        }

    def to_model_spec(self) -> ModelSpec:
        is_fixed = self.backbone == "subln"
        options = {
            **self._trunk_options(),
            "backbone": self.backbone,
            "d_ff": self.intermediate_size,
            "attention_bias": None if is_fixed else self.attention_bias,
            "qk_norm": self.qk_norm,
            "dropout": self.hidden_dropout,
            "moe": self._moe_options() if self.num_experts else None,
        }
        if is_fixed:
            options["kv_heads"] = None
        return ModelSpec.model_validate(options)

    def _moe_options(self) -> dict[str, Any]:
        layer_counts = {self.head_projection_layers, self.merge_projection_layers} - {0}
        if len(layer_counts) > 1:
            raise ValueError("head_projection_layers and merge_projection_layers differ; here they are equal or 0")
        return {
            "experts": self.num_experts,
            "top_k": self.num_experts_per_tok,
            "d_expert": self.moe_intermediate_size,
            "every": self.decoder_sparse_step,
            "dense_first": self.first_k_dense_replace,
            "heads": self.moe_heads,
            "d_sub_token": self.sub_token_size,
            "head_projection": self.head_projection_layers > 0,
            "merge_projection": self.merge_projection_layers > 0,
            "projection_layers": max(layer_counts, default=1),
            "sub_token_residual": self.sub_token_residual,
            "d_shared": self.shared_expert_intermediate_size,
            "router": self.router_type,
            "router_dim": self.router_dim if self.router_type == "xmoe" else None,
            "scoring": self.scoring_func,
            "normalize_gates": self.norm_topk_prob,
            "gate_scale": self.routed_scaling_factor,
            "groups": self.n_group,
            "top_groups": self.topk_group,
            "bias_rate": BIAS_RATE if self.router_bias else 0.0,
            "jitter": self.router_jitter_noise,
            "balance_weight": self.router_aux_loss_coef,
            "z_weight": self.router_z_loss_coef,
            "balance_choices": self.balance_choices,
        }
