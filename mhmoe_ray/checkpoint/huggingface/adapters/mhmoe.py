"""Translation of config.json of MH-MoE models (`configuration_mhmoe.MhmoeConfig`) to and from a spec."""

from typing import Any, ClassVar, Literal

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
    model_keys: ClassVar = {
        "backbone": "backbone",
        "intermediate_size": "d_ff",
        "attention_bias": "attention_bias",
        "qk_norm": "qk_norm",
        "hidden_dropout": "dropout",
    }
    moe_keys: ClassVar = {
        "num_experts": "experts",
        "num_experts_per_tok": "top_k",
        "moe_intermediate_size": "d_expert",
        "decoder_sparse_step": "every",
        "first_k_dense_replace": "dense_first",
        "moe_heads": "heads",
        "sub_token_residual": "sub_token_residual",
        "shared_expert_intermediate_size": "d_shared",
        "router_type": "router",
        "router_dim": "router_dim",
        "scoring_func": "scoring",
        "norm_topk_prob": "normalize_gates",
        "routed_scaling_factor": "gate_scale",
        "n_group": "groups",
        "topk_group": "top_groups",
        "router_jitter_noise": "jitter",
        "router_aux_loss_coef": "balance_weight",
        "router_z_loss_coef": "z_weight",
        "balance_choices": "balance_choices",
    }

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
    def _may_express(cls, model: ModelSpec) -> bool:
        return True

    @classmethod
    def _special_fields(cls, model: ModelSpec) -> dict[str, Any]:
        fields: dict[str, Any] = {"hidden_act": "silu" if model.architecture.expert_function == "swiglu" else "gelu"}
        if moe := model.moe:
            fields |= {
                "sub_token_size": moe.d_sub_token,
                "head_projection_layers": moe.projection_layers * moe.has_head_projection,
                "merge_projection_layers": moe.projection_layers * moe.has_merge_projection,
                "router_bias": moe.bias_rate > 0,
            }
        return fields

    def _options(self) -> dict[str, Any]:
        options = {**super()._options(), "moe": self._moe_options() if self.num_experts else None}
        # The subln backbone fixes these options, so a spec must not set them.
        return {**options, "attention_bias": None, "kv_heads": None} if self.backbone == "subln" else options

    def _moe_options(self) -> dict[str, Any]:
        layer_counts = {self.head_projection_layers, self.merge_projection_layers} - {0}
        if len(layer_counts) > 1:
            raise ValueError("head_projection_layers and merge_projection_layers differ; here they are equal or 0")
        return {
            **{option: getattr(self, key) for key, option in self.moe_keys.items()},
            "d_sub_token": self.sub_token_size,
            "head_projection": self.head_projection_layers > 0,
            "merge_projection": self.merge_projection_layers > 0,
            "projection_layers": max(layer_counts, default=1),
            "router_dim": self.router_dim if self.router_type == "xmoe" else None,
            "bias_rate": BIAS_RATE if self.router_bias else 0.0,
        }
