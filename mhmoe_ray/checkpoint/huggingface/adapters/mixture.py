"""Translation of config.json of sparse mixtures of experts (Mixtral, Qwen3-MoE and OLMoE) to and from a spec.

These models route each token as a whole, and do not split it into sub-tokens.
"""

from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from mhmoe_ray.checkpoint.huggingface.adapters.base import Adapter
from mhmoe_ray.spec import ModelSpec


class MixtureAdapter(Adapter):
    """Keys of config.json that mixtures of experts share."""

    moe_keys: ClassVar = {"num_experts_per_tok": "top_k"}
    fixed_moe_options: ClassVar[dict[str, Any]] = {"heads": 1, "every": 1}
    """Options of `model.moe` that all models of the architecture have, unless `moe_keys` gives them."""

    hidden_act: Literal["silu"] = "silu"
    num_experts_per_tok: PositiveInt
    router_aux_loss_coef: NonNegativeFloat = 0.001

    @classmethod
    def _may_express(cls, model: ModelSpec) -> bool:
        return model.backbone == "llama" and model.moe is not None

    @classmethod
    def _special_fields(cls, model: ModelSpec) -> dict[str, Any]:
        assert model.moe is not None
        # Under a uniform load, the load balancing loss is top_k in transformers and 1 in this package. Transformers
        # takes the mean over layers, and this package the sum.
        return {"router_aux_loss_coef": model.moe.balance_weight * model.moe_layers / model.moe.top_k}

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "moe": self._moe_options()}

    def _moe_options(self) -> dict[str, Any]:
        """Return the `model.moe` section that these keys describe."""
        coefficient, top_k = self.router_aux_loss_coef, self.num_experts_per_tok
        return {
            **self.fixed_moe_options,
            **{option: getattr(self, key) for key, option in self.moe_keys.items()},
            "balance_weight": coefficient * top_k / self._moe_layers(),
            "balance_choices": "all" if coefficient and top_k > 1 else "first",
        }

    def _moe_layers(self) -> int:
        return self.num_hidden_layers


class MixtralAdapter(MixtureAdapter):
    """Keys of config.json of Mixtral."""

    model_type = "mixtral"
    class_name = "MixtralForCausalLM"
    default_theta = 1e6
    moe_keys: ClassVar = {
        **MixtureAdapter.moe_keys,
        "intermediate_size": "d_expert",
        "num_local_experts": "experts",
        "router_jitter_noise": "jitter",
    }
    # Mixtral divides the gates of a token by their sum. With one expert per token the gate would always be 1 and the
    # router would learn nothing, so the spec refuses such a model.
    fixed_moe_options: ClassVar = {**MixtureAdapter.fixed_moe_options, "normalize_gates": True}

    intermediate_size: PositiveInt
    num_local_experts: PositiveInt
    num_key_value_heads: PositiveInt | None = 8
    rms_norm_eps: float = 1e-5
    router_jitter_noise: NonNegativeFloat = 0.0


class ManyExpertsAdapter(MixtureAdapter):
    """Keys of config.json and names of tensors that Qwen3-MoE and OLMoE share."""

    name_replacements = (
        (".block_sparse_moe.", ".mlp."),
        (".w1.weight", ".gate_proj.weight"),
        (".w3.weight", ".up_proj.weight"),
        (".w2.weight", ".down_proj.weight"),
    )
    model_keys: ClassVar = {"attention_bias": "attention_bias"}
    has_bias_switch = True
    moe_keys: ClassVar = {**MixtureAdapter.moe_keys, "num_experts": "experts", "norm_topk_prob": "normalize_gates"}

    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt = 8
    norm_topk_prob: bool = False
    attention_bias: bool = False

    @model_validator(mode="before")
    @classmethod
    def _unify_expert_count(cls, fields: dict[str, Any]) -> dict[str, Any]:
        # Some versions of transformers write the number of experts under the name that Mixtral gives it.
        if "num_local_experts" not in fields or "num_experts" in fields:
            return fields
        other_fields = {key: value for key, value in fields.items() if key != "num_local_experts"}
        return {**other_fields, "num_experts": fields["num_local_experts"]}


class Qwen3MoeAdapter(ManyExpertsAdapter):
    """Keys of config.json of Qwen3-MoE, which normalizes each head of queries and keys."""

    model_type = "qwen3_moe"
    class_name = "Qwen3MoeForCausalLM"
    fixed_options: ClassVar = {"qk_norm": "head"}
    moe_keys: ClassVar = {
        **ManyExpertsAdapter.moe_keys,
        "moe_intermediate_size": "d_expert",
        "decoder_sparse_step": "every",
    }

    intermediate_size: PositiveInt
    num_key_value_heads: PositiveInt | None = 4
    moe_intermediate_size: PositiveInt = 768
    num_experts: PositiveInt = 128
    decoder_sparse_step: PositiveInt = 1
    mlp_only_layers: list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: PositiveInt | None = 4096

    @classmethod
    def _special_fields(cls, model: ModelSpec) -> dict[str, Any]:
        assert model.moe is not None
        return {
            **super()._special_fields(model),
            # `intermediate_size` is a required key, even if no layer is dense.
            "intermediate_size": model.d_ff or model.moe.d_expert,
            "mlp_only_layers": list(range(model.moe.dense_first)),
        }

    def _options(self) -> dict[str, Any]:
        has_dense_layers = self.decoder_sparse_step > 1 or self._dense_first() > 0
        return {**super()._options(), "d_ff": self.intermediate_size if has_dense_layers else None}

    def _moe_options(self) -> dict[str, Any]:
        return {**super()._moe_options(), "dense_first": self._dense_first()}

    def _moe_layers(self) -> int:
        layers = range(self._dense_first(), self.num_hidden_layers)
        return max(1, sum((layer + 1) % self.decoder_sparse_step == 0 for layer in layers))

    def _dense_first(self) -> int:
        """Return the number of first dense layers; ValueError if `mlp_only_layers` names others than the first."""
        layers = sorted(self.mlp_only_layers or [])
        if layers != list(range(len(layers))):
            raise ValueError(f"mlp_only_layers is {layers}; only the first layers can be dense here")
        return len(layers)


class OlmoeAdapter(ManyExpertsAdapter):
    """Keys of config.json of OLMoE, which normalizes the queries of all heads together, and the keys likewise."""

    model_type = "olmoe"
    class_name = "OlmoeForCausalLM"
    fixed_options: ClassVar = {"qk_norm": "all"}
    moe_keys: ClassVar = {**ManyExpertsAdapter.moe_keys, "intermediate_size": "d_expert"}

    intermediate_size: PositiveInt
    num_experts: PositiveInt = 64
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: NonNegativeFloat = 0.01
    clip_qkv: Literal[None] = None

    @classmethod
    def _may_express(cls, model: ModelSpec) -> bool:
        return super()._may_express(model) and model.d_head is None
