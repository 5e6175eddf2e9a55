"""The decoder of `model/decoder.py`, llama backbone, with its multi-head mixture of experts, in vLLM's layers.

Most modules have the training model's names. Tables translate the names of a gated layer's matrices and of the experts'
matrices, which vLLM merges.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
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
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from mhmoe_ray.model.router import Router
from mhmoe_ray.spec import ModelSpec


class FeedForward(nn.Module):
    """SwiGLU without biases; its hidden rows are sharded over the tensor-parallel ranks."""

    def __init__(self, width: int, hidden: int, prefix: str) -> None:
        super().__init__()
        self.gate_up = MergedColumnParallelLinear(
            width, [hidden] * 2, bias=False, return_bias=False, prefix=f"{prefix}.gate_up"
        )
        self.down_proj = RowParallelLinear(hidden, width, bias=False, return_bias=False, prefix=f"{prefix}.down_proj")
        self.act = SiluAndMul()

    def forward(self, x_TM: Tensor) -> Tensor:
        y_TM: Tensor = self.down_proj(self.act(self.gate_up(x_TM)))
        return y_TM


def _projection(width: int, layers: int, prefix: str) -> nn.Module:
    """Return a projection d -> d of one or more linear layers with ReLU between them, complete on each rank."""
    # Experts are sharded by hidden rows or by number, so each rank needs complete rows as input.
    if layers == 1:
        projection: nn.Module = ReplicatedLinear(width, width, return_bias=False, prefix=prefix)
        return projection
    modules: list[nn.Module] = []
    for i in range(0, 2 * layers, 2):
        modules += [ReplicatedLinear(width, width, return_bias=False, prefix=f"{prefix}.{i}"), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class MultiHeadMoE(nn.Module):
    """The multi-head mixture of experts, with vLLM's fused experts and the training model's router."""

    def __init__(self, spec: ModelSpec, prefix: str) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.heads, self.residual, width = moe.heads, moe.sub_token_residual, spec.d_model // moe.heads
        self.head = (
            _projection(spec.d_model, moe.projection_layers, f"{prefix}.head") if moe.has_head_projection else None
        )
        # The training model's router in float32: two scores that bfloat16 cannot tell apart must still give the same
        # route as in training.
        self.router = Router(width, moe).float()
        self.experts = FusedMoEFactory(
            num_experts=moe.experts,
            top_k=moe.top_k,
            hidden_size=width,
            intermediate_size=moe.d_expert,
            custom_routing_function=self._route,
            prefix=f"{prefix}.experts",
        )
        self.merge = (
            _projection(spec.d_model, moe.projection_layers, f"{prefix}.merge") if moe.has_merge_projection else None
        )
        self.shared = FeedForward(spec.d_model, moe.d_shared, f"{prefix}.shared") if moe.d_shared else None
        self.count_E: Tensor
        self.register_buffer("count_E", torch.zeros(moe.experts, dtype=torch.long), persistent=False)

    def forward(self, x_TM: Tensor) -> Tensor:
        """Return the layer's output for T tokens, without the residual connection around it."""
        shared_TM = self.shared(x_TM) if self.shared else None
        # vLLM's experts may write into their input rows. Those of a projection are not used elsewhere; `x_TM` may be.
        y_TM = self.head(x_TM) if self.head else x_TM.clone()
        x_ND = y_TM.reshape(-1, y_TM.shape[-1] // self.heads)
        input_ND = x_ND.clone() if self.residual else None
        y_ND: Tensor = self.experts(x_ND, self.router.scores(x_ND.float()))
        if input_ND is not None:
            y_ND = input_ND + y_ND
        y_TM = y_ND.reshape(x_TM.shape)
        if self.merge:
            y_TM = self.merge(y_TM)
        return y_TM if shared_TM is None else y_TM + shared_TM

    def _route(self, gating_output: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Return the gates and the experts of each row, and count the routes. vLLM calls this."""
        expert_NK, gate_NK = self.router.choose_experts(gating_output)[:2]
        expert_R = expert_NK.flatten()
        # With CUDA graphs, padding rows are counted too, because the layer cannot tell them from others.
        self.count_E.index_add_(0, expert_R, torch.ones_like(expert_R))
        return gate_NK, expert_NK


PAIRS = {"gate_FD": ("gate_up.weight", 0), "up_FD": ("gate_up.weight", 1), "down_DF": ("down_proj.weight", None)}
"""Parameter for each matrix of a gated layer, and the matrix's index in it; None if it is the whole parameter."""
EXPERTS = {"gate_EFD": ("w13_weight", "w1"), "up_EFD": ("w13_weight", "w3"), "down_EDF": ("w2_weight", "w2")}
"""Parameter for each matrix of the experts, and the matrix's name for vLLM's loader, which loads expert by expert."""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over vLLM's paged KV cache."""

    def __init__(self, spec: ModelSpec, positions: int, cache: CacheConfig, prefix: str) -> None:
        super().__init__()
        width, kv_heads = spec.head_width, spec.n_kv_heads
        self.qkv = QKVParallelLinear(
            spec.d_model,
            width,
            spec.attention_heads,
            kv_heads,
            bias=False,
            return_bias=False,
            prefix=f"{prefix}.qkv",
        )
        self.out = RowParallelLinear(spec.d_model, spec.d_model, bias=False, return_bias=False, prefix=f"{prefix}.out")
        rope = {"rope_type": "default", "rope_theta": spec.rope_theta}
        self.rotary = get_rope(width, max_position=positions, rope_parameters=rope, is_neox_style=True)
        # With more ranks than key-value heads, each rank holds a copy of one of them.
        ranks = get_tensor_model_parallel_world_size()
        heads, kv_heads = spec.attention_heads // ranks, max(1, kv_heads // ranks)
        self.widths = [heads * width, kv_heads * width, kv_heads * width]
        self.attend = PagedAttention(
            heads, width, width**-0.5, num_kv_heads=kv_heads, cache_config=cache, prefix=f"{prefix}.attend"
        )

    def forward(self, position_T: Tensor, x_TM: Tensor) -> Tensor:
        q, k, v = self.qkv(x_TM).split(self.widths, dim=-1)
        q, k = self.rotary(position_T, q, k)
        y_TM: Tensor = self.out(self.attend(q, k, v))
        return y_TM


class Block(nn.Module):
    """A decoder block: attention, then a feed-forward layer or a mixture of experts."""

    def __init__(self, spec: ModelSpec, layer: int, positions: int, cache: CacheConfig, prefix: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.d_model, spec.norm_eps)
        self.attention = Attention(spec, positions, cache, f"{prefix}.attention")
        self.ffn_norm = RMSNorm(spec.d_model, spec.norm_eps)
        self.moe = MultiHeadMoE(spec, f"{prefix}.moe") if spec.is_moe_layer(layer) else None
        if self.moe is None:
            assert spec.d_ff is not None
            self.ffn = FeedForward(spec.d_model, spec.d_ff, f"{prefix}.ffn")

    def forward(self, position_T: Tensor, x_TM: Tensor, residual_TM: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output of the block's last layer, and the residual stream before it.

        vLLM's next norm adds the two.
        """
        if residual_TM is None:
            residual_TM, x_TM = x_TM, self.attention_norm(x_TM)
        else:
            x_TM, residual_TM = self.attention_norm(x_TM, residual_TM)
        x_TM = self.attention(position_T, x_TM)
        x_TM, residual_TM = self.ffn_norm(x_TM, residual_TM)
        return (self.ffn if self.moe is None else self.moe)(x_TM), residual_TM


@support_torch_compile
class Trunk(nn.Module):
    """The decoder without its output layer: from token ids to the normed output of the last block."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        spec = ModelSpec.model_validate(config.model)
        self.embedding = VocabParallelEmbedding(spec.vocab_size, spec.d_model)
        self.blocks = nn.ModuleList(
            Block(spec, i, config.max_position_embeddings, vllm_config.cache_config, f"{prefix}.blocks.{i}")
            for i in range(spec.layers)
        )
        self.norm = RMSNorm(spec.d_model, spec.norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        x_TM: Tensor = self.embedding(input_ids)
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
        for block in self.blocks:
            x_TM, residual_TM = block(positions, x_TM, residual_TM)
        output_TM: Tensor = self.norm(x_TM, residual_TM)[0]
        return output_TM


class MhmoeForCausalLM(nn.Module):
    """The decoder with its output layer; `plugin.register` registers it with vLLM.

    The model supports tensor and expert parallelism, but no pipeline parallelism.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        rows = ModelSpec.model_validate(config.model).vocab_size
        self.model = Trunk(vllm_config=vllm_config, prefix=f"{prefix}.model".strip("."))
        self.output = ParallelLMHead(rows, config.hidden_size, prefix=f"{prefix}.output".strip("."))
        if config.tie_word_embeddings:
            self.output = self.output.tie_weights(self.model.embedding)
        # The logits are cut to the tokens of the tokenizer, since the other rows have no text.
        self.logits = LogitsProcessor(config.vocab_size)

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
        logits_TV: Tensor | None = self.logits(self.output, hidden_states)
        return logits_TV

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors and return the names of the loaded parameters.

        Each parameter takes its rank's shard.
        """
        # vLLM's parameters have an attribute `weight_loader`, which torch's types do not declare.
        targets: dict[str, Any] = dict(self.named_parameters()) | dict(self.named_buffers())
        loaded_names = set()
        for name, tensor in weights:
            owner, _, leaf_name = name.rpartition(".")
            prefix = "" if owner == "output" else "model."
            if leaf_name in EXPERTS:
                target, shard_id = EXPERTS[leaf_name]
                target = f"{prefix}{owner}.routed_experts.{target}"
                for expert, matrix in enumerate(tensor):
                    targets[target].weight_loader(targets[target], matrix, target, shard_id, expert)
            elif leaf_name in PAIRS:
                target, index = PAIRS[leaf_name]
                target = f"{prefix}{owner}.{target}"
                _load(targets[target], tensor, index)
            else:
                target = prefix + name
                _load(targets[target], tensor)
            loaded_names.add(target)
        return loaded_names

    def route_counts(self) -> list[list[int]]:
        """Return the routes per layer and expert since `reset_counts`."""
        return [m.count_E.tolist() for m in self.modules() if isinstance(m, MultiHeadMoE)]

    @torch.inference_mode()
    def reset_counts(self) -> None:
        """Set the counts of routes to zero."""
        for m in self.modules():
            if isinstance(m, MultiHeadMoE):
                m.count_E.zero_()


def _load(target: Tensor, tensor: Tensor, index: int | None = None) -> None:
    """Load a tensor into a parameter, or into part `index` of a merged one."""
    loader = getattr(target, "weight_loader", default_weight_loader)
    loader(target, tensor) if index is None else loader(target, tensor, index)
