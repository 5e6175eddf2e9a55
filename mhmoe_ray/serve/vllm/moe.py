"""The multi-head mixture-of-experts layer of `model/moe.py` in vLLM's layers. N: rows, which here are sub-tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear

from mhmoe_ray.model.router import Router
from mhmoe_ray.spec import ModelSpec


class FeedForward(nn.Module):
    """SwiGLU without biases, its hidden rows spread over tensor-parallel ranks."""

    def __init__(self, width: int, hidden: int, prefix: str) -> None:
        super().__init__()
        self.gate_up = MergedColumnParallelLinear(
            width, [hidden] * 2, bias=False, return_bias=False, prefix=f"{prefix}.gate_up"
        )
        self.down = RowParallelLinear(hidden, width, bias=False, return_bias=False, prefix=f"{prefix}.down")
        self.act = SiluAndMul()

    def forward(self, x_TM: Tensor) -> Tensor:
        y_TM: Tensor = self.down(self.act(self.gate_up(x_TM)))
        return y_TM


def _projection(width: int, layers: int, prefix: str) -> nn.Module:
    """d -> d, each rank the whole of it: experts are spread by their hidden rows or by number, and see whole rows."""
    if layers == 1:
        one: nn.Module = ReplicatedLinear(width, width, return_bias=False, prefix=prefix)
        return one
    parts: list[nn.Module] = []
    for i in range(0, 2 * layers, 2):
        parts += [ReplicatedLinear(width, width, return_bias=False, prefix=f"{prefix}.{i}"), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class MultiHeadMoE(nn.Module):
    def __init__(self, spec: ModelSpec, prefix: str) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.heads, self.residual, width = moe.heads, moe.sub_token_residual, spec.d_model // moe.heads
        self.head = _projection(spec.d_model, moe.projection_layers, f"{prefix}.head") if moe.has_head else None
        # The training model's own, in its own precision: of two scores that bfloat16 cannot tell apart, one must still
        # be the larger.
        self.router = Router(width, moe).float()
        self.experts = FusedMoEFactory(
            num_experts=moe.experts,
            top_k=moe.top_k,
            hidden_size=width,
            intermediate_size=moe.d_expert,
            custom_routing_function=self._choose,
            prefix=f"{prefix}.experts",
        )
        self.merge = _projection(spec.d_model, moe.projection_layers, f"{prefix}.merge") if moe.has_merge else None
        self.shared = FeedForward(spec.d_model, moe.d_shared, f"{prefix}.shared") if moe.d_shared else None
        self.count_E: Tensor
        self.register_buffer("count_E", torch.zeros(moe.experts, dtype=torch.long), persistent=False)

    def forward(self, x_TM: Tensor) -> Tensor:
        """x_TM: T tokens."""
        shared_TM = self.shared(x_TM) if self.shared else None
        # vLLM's experts may write into their rows; those of a projection are nobody else's.
        y_TM = self.head(x_TM) if self.head else x_TM.clone()
        x_ND = y_TM.reshape(-1, y_TM.shape[-1] // self.heads)
        before_ND = x_ND.clone() if self.residual else None
        y_ND: Tensor = self.experts(x_ND, self.router.scores(x_ND.float()))
        if before_ND is not None:
            y_ND = before_ND + y_ND
        y_TM = y_ND.reshape(x_TM.shape)
        if self.merge:
            y_TM = self.merge(y_TM)
        return y_TM if shared_TM is None else y_TM + shared_TM

    def _choose(self, gating_output: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        expert_NK, gate_NK = self.router.choose(gating_output)[:2]
        chosen_R = expert_NK.flatten()
        # With CUDA graphs, rows that fill a step up are counted too: the layer does not know which these are.
        self.count_E.index_add_(0, chosen_R, torch.ones_like(chosen_R))
        return gate_NK, expert_NK
