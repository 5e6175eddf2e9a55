"""The decoder of `model/decoder.py` (llama backbone) with its multi-head mixture of experts, made of vLLM's layers.

Modules are named like an exported folder's tensors, for vLLM's own loader, except those that vLLM merges
(`WEIGHT_NAMES`).
"""

from collections.abc import Iterable
from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention as PagedAttention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.platforms import current_platform

from mhmoe_ray.model.router import Router
from mhmoe_ray.serving.vllm.folder import check_fits, model_spec
from mhmoe_ray.spec import ModelSpec

WEIGHT_NAMES = WeightsMapper(
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        ".shared_expert.gate_proj": (".shared_expert.gate_up_proj", 0),
        ".shared_expert.up_proj": (".shared_expert.gate_up_proj", 1),
    },
    # The router is the class that training uses, so its parameters have other names than in the exported folder.
    orig_to_new_suffix={
        ".gate.weight": ".gate.scores.weight_ED",
        ".gate.wg_reduction.weight": ".gate.scores.reduce_QD",
        ".gate.wg": ".gate.scores.expert_EQ",
        ".gate.log_temperature": ".gate.scores.log_temperature",
        ".gate.e_score_correction_bias": ".gate.bias_E",
    },
)
"""Names of parameters by the names of the tensors of an exported folder, where the two differ."""


class VllmFeedForward(nn.Module):
    """SwiGLU layer without biases; its hidden units are sharded over the tensor-parallel ranks."""

    def __init__(self, width: int, hidden: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        options = {"bias": False, "return_bias": False, "quant_config": quant_config}
        self.gate_up_proj = MergedColumnParallelLinear(width, [hidden] * 2, prefix=f"{prefix}.gate_up_proj", **options)
        self.down_proj = RowParallelLinear(hidden, width, prefix=f"{prefix}.down_proj", **options)
        self.act = SiluAndMul()

    def forward(self, x_TM: Tensor) -> Tensor:
        y_TM: Tensor = self.down_proj(self.act(self.gate_up_proj(x_TM)))
        return y_TM


def _projection(widths: list[int], quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
    """Return a projection that each rank has in full: linear layers between the given widths, with ReLU in between."""
    # The experts between the projections are sharded over ranks, by hidden units or by whole experts. In both cases
    # each rank needs complete rows as input, so projections are replicated.
    options = {"return_bias": False, "quant_config": quant_config}
    if len(widths) == 2:
        projection: nn.Module = ReplicatedLinear(*widths, prefix=prefix, **options)
        return projection
    modules: list[nn.Module] = []
    for i, shape in enumerate(pairwise(widths)):
        modules += [ReplicatedLinear(*shape, prefix=f"{prefix}.{2 * i}", **options), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class VllmMultiHeadMoE(nn.Module):
    """The multi-head mixture of experts, with vLLM's fused experts and the training model's router."""

    def __init__(self, spec: ModelSpec, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.residual, self.row_width, widths = moe.sub_token_residual, spec.row_width, spec.projection_widths
        self.head_proj = _projection(widths, quant_config, f"{prefix}.head_proj") if moe.has_head_projection else None
        # The router is that of training and computes in float32, because two scores that bfloat16 cannot tell apart
        # must still give the same route as in training.
        self.gate = Router(self.row_width, moe).float()
        if moe.bias_rate:
            # vLLM's loader fills only parameters, so the bias, which is a buffer, becomes a parameter.
            bias_E = self.gate.bias_E
            del self.gate.bias_E
            self.gate.bias_E = nn.Parameter(bias_E, requires_grad=False)
        # With adapters vLLM would choose a kernel that can adapt experts, which a CPU lacks. Ours adapt linear layers.
        expert_config = copy(get_current_vllm_config())
        expert_config.lora_config = None
        with set_current_vllm_config(expert_config):
            self.experts = FusedMoEFactory(
                num_experts=moe.experts,
                top_k=moe.top_k,
                hidden_size=self.row_width,
                intermediate_size=moe.d_expert,
                custom_routing_function=self._route,
                quant_config=quant_config,
                prefix=f"{prefix}.experts",
                ckpt_names=("w1", "w2", "w3"),
            )
        self.merge_proj = (
            _projection(widths[::-1], quant_config, f"{prefix}.merge_proj") if moe.has_merge_projection else None
        )
        self.shared_expert = (
            VllmFeedForward(spec.d_model, moe.d_shared, quant_config, f"{prefix}.shared_expert")
            if moe.d_shared
            else None
        )
        self.count_E: Tensor
        self.register_buffer("count_E", torch.zeros(moe.experts, dtype=torch.long), persistent=False)

    def forward(self, x_TM: Tensor) -> Tensor:
        """Return the layer's output for T tokens, without the residual connection around it."""
        shared_TM = self.shared_expert(x_TM) if self.shared_expert else None
        # vLLM's experts may overwrite their input rows. The output of a projection is not used elsewhere, but `x_TM`
        # may be, so it is cloned.
        y_TM = self.head_proj(x_TM) if self.head_proj else x_TM.clone()
        joined_shape, x_ND = y_TM.shape, y_TM.reshape(-1, self.row_width)
        input_ND = x_ND.clone() if self.residual else None
        y_ND: Tensor = self.experts(x_ND, self.gate.scores(x_ND.float()))
        if input_ND is not None:
            y_ND = input_ND + y_ND
        y_TM = y_ND.reshape(joined_shape)
        if self.merge_proj:
            y_TM = self.merge_proj(y_TM)
        return y_TM if shared_TM is None else y_TM + shared_TM

    def _route(self, gating_output: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Return the gates and the experts of each sub-token, and count the routes. vLLM calls this."""
        expert_NK, gate_NK = self.gate.choose_experts(gating_output)[:2]
        expert_R = expert_NK.flatten()
        # With CUDA graphs, padding is counted too, because the layer cannot tell it from sub-tokens.
        self.count_E.index_add_(0, expert_R, torch.ones_like(expert_R))
        return gate_NK, expert_NK


class VllmAttention(nn.Module):
    """Grouped-query attention with rotary positions, over vLLM's paged KV cache."""

    def __init__(
        self,
        spec: ModelSpec,
        config: Any,
        cache: CacheConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        width, kv_heads, ranks = spec.head_width, spec.n_kv_heads, get_tensor_model_parallel_world_size()
        bias, options = spec.biased_attention, {"return_bias": False, "quant_config": quant_config}
        self.qkv_proj = QKVParallelLinear(
            spec.d_model,
            width,
            spec.attention_heads,
            kv_heads,
            bias=bias != "none",
            prefix=f"{prefix}.qkv_proj",
            **options,
        )
        self.o_proj = RowParallelLinear(
            spec.query_width, spec.d_model, bias=bias == "all", prefix=f"{prefix}.o_proj", **options
        )
        # With more ranks than key-value heads, each rank holds a copy of one of them.
        heads, kv_heads = spec.attention_heads // ranks, max(1, kv_heads // ranks)
        self.widths, self.head_width, self.qk_norm = (
            [heads * width, kv_heads * width, kv_heads * width],
            width,
            spec.qk_norm,
        )
        if spec.qk_norm != "none":
            is_per_head = spec.qk_norm == "head"
            self.q_norm = RMSNorm(width if is_per_head else self.widths[0], spec.norm_eps)
            self.k_norm = RMSNorm(width if is_per_head else self.widths[1], spec.norm_eps)
        self.rotary_emb = get_rope(
            width,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
        )
        self.attn = PagedAttention(
            heads,
            width,
            width**-0.5,
            num_kv_heads=kv_heads,
            cache_config=cache,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, position_T: Tensor, x_TM: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x_TM).split(self.widths, dim=-1)
        if self.qk_norm != "none":
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        q, k = self.rotary_emb(position_T, q, k)
        y_TM: Tensor = self.o_proj(self.attn(q, k, v))
        return y_TM

    def _normed(self, norm: nn.Module, rows_TM: Tensor) -> Tensor:
        """Apply a norm to queries or keys, to each head by itself or to all heads together."""
        # vLLM's norm needs rows that lie one after another in memory.
        norm_width = self.head_width if self.qk_norm == "head" else rows_TM.shape[-1]
        normed_rows: Tensor = norm(rows_TM.contiguous().view(-1, norm_width))
        return normed_rows.view(rows_TM.shape)


class VllmBlock(nn.Module):
    """A decoder block: attention, then a feed-forward layer or a mixture of experts."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        config: Any,
        cache: CacheConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.d_model, spec.norm_eps)
        self.self_attn = VllmAttention(spec, config, cache, quant_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(spec.d_model, spec.norm_eps)
        self.is_sparse = spec.is_moe_layer(layer)
        if self.is_sparse:
            self.block_sparse_moe = VllmMultiHeadMoE(spec, quant_config, f"{prefix}.block_sparse_moe")
        else:
            assert spec.d_ff is not None
            self.mlp = VllmFeedForward(spec.d_model, spec.d_ff, quant_config, f"{prefix}.mlp")

    def forward(self, position_T: Tensor, x_TM: Tensor, residual_TM: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output of the block's last layer and the residual stream, which vLLM's next norm adds."""
        if residual_TM is None:
            residual_TM, x_TM = x_TM, self.input_layernorm(x_TM)
        else:
            x_TM, residual_TM = self.input_layernorm(x_TM, residual_TM)
        x_TM = self.self_attn(position_T, x_TM)
        x_TM, residual_TM = self.post_attention_layernorm(x_TM, residual_TM)
        return (self.block_sparse_moe if self.is_sparse else self.mlp)(x_TM), residual_TM


@support_torch_compile
class VllmTrunk(nn.Module):
    """The decoder without its output layer: from token ids to the normed output of the last block."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        spec = model_spec(config)
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.d_model)
        self.layers = nn.ModuleList(
            VllmBlock(spec, i, config, vllm_config.cache_config, vllm_config.quant_config, f"{prefix}.layers.{i}")
            for i in range(spec.layers)
        )
        self.norm = RMSNorm(spec.d_model, spec.norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        x_TM: Tensor = self.embed_tokens(input_ids)
        return x_TM

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert input_ids is not None
        x_TM = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual_TM = None
        for layer in self.layers:
            x_TM, residual_TM = layer(positions, x_TM, residual_TM)
        output_TM: Tensor = self.norm(x_TM, residual_TM)[0]
        return output_TM


class MhmoeForCausalLM(nn.Module, SupportsLoRA):
    """The decoder with its output layer, for tensor and expert parallelism, but no pipeline parallelism."""

    # vLLM looks up both names when it reads the configuration of a quantized model.
    hf_to_vllm_mapper = WEIGHT_NAMES
    packed_modules_mapping = {  # noqa: RUF012 - vLLM reads it from the class
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Create the model without weights; a model that vLLM has no layers for or cannot shard is a ServeError."""
        super().__init__()
        # vLLM reads both, the configuration to create adapters.
        self.config, self.quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        config = self.config
        parallel = vllm_config.parallel_config
        check_fits(
            model_spec(config),
            current_platform.is_cpu(),
            parallel.tensor_parallel_size,
            parallel.enable_expert_parallel,
        )
        self.tokenizer_size = config.tokenizer_size or config.vocab_size
        self.model = VllmTrunk(vllm_config=vllm_config, prefix=f"{prefix}.model".strip("."))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=f"{prefix}.lm_head".strip("."),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        x_TM: Tensor = self.model.embed_input_ids(input_ids)
        return x_TM

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        x_TM: Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return x_TM

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits (TV), with -inf for ids beyond the tokenizer's, because these ids have no text."""
        logits_TV: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        if logits_TV is not None:
            logits_TV[:, self.tokenizer_size :] = float("-inf")
        return logits_TV

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the named tensors of an exported folder, and return the names of the parameters that were loaded."""
        names: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=WEIGHT_NAMES)
        return names

    def route_counts(self) -> list[list[int]]:
        """Return the routes to each expert of each layer since `reset_counts`."""
        return [m.count_E.tolist() for m in self.modules() if isinstance(m, VllmMultiHeadMoE)]

    @torch.inference_mode()
    def reset_counts(self) -> None:
        for m in self.modules():
            if isinstance(m, VllmMultiHeadMoE):
                m.count_E.zero_()
