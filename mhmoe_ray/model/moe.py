"""The multi-head mixture-of-experts layer (P1, section 3.1; P2, section 2.1); with h = 1 the plain sparse one.

    x (N, d) -> head projection -> split (N*h, d/h) -> router -> experts -> join (N, d) -> merge projection

The h sub-tokens of a token are neighbouring rows (token-major, head-minor). There is no residual around a sub-token:
the block's own residual is the only one, as in the authors' code and the second paper; equation 6 of the first paper
prints one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhmoe_kernels import ExpertWeights, run_experts
from mhmoe_ray.model.router import LinearRouter, Routing
from mhmoe_ray.spec import ModelSpec

Dispatch = Callable[[Tensor, Routing, "Experts"], Tensor]
"""Brings routed rows to their experts and the combined outputs back: (x_ND, routing, experts) -> y_ND."""


class Experts(nn.Module):
    """The experts `held` of a layer's E; all of them unless expert parallelism spreads them over ranks."""

    def __init__(self, width: int, d_expert: int, held: range, kernel: str) -> None:
        super().__init__()
        self.held, self.kernel = held, kernel
        self.gate_EFD = nn.Parameter(torch.empty(len(held), d_expert, width))
        self.up_EFD = nn.Parameter(torch.empty(len(held), d_expert, width))
        self.down_EDF = nn.Parameter(torch.empty(len(held), width, d_expert))

    def forward(self, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor) -> Tensor:
        """Experts are numbered from 0 within those held here."""
        weights = ExpertWeights(self.gate_EFD, self.up_EFD, self.down_EDF)
        if torch.is_autocast_enabled(x_ND.device.type):
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            x_ND, weights = x_ND.to(dtype), ExpertWeights(*(w.to(dtype) for w in weights))
        return run_experts(self.kernel, x_ND, expert_NK, gate_NK, weights)


def dispatch_locally(x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """All experts are here."""
    y_ND: Tensor = experts(x_ND, routing.expert_NK, routing.gate_NK)
    return y_ND


class MultiHeadMoE(nn.Module):
    def __init__(self, spec: ModelSpec, held: range | None = None) -> None:
        """Args:
        spec: its `moe` section must be present.
        held: the global ids of the experts that this process holds; all by default.
        """
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.heads = moe.heads
        width = spec.d_model // moe.heads
        if moe.heads > 1:
            self.head = nn.Linear(spec.d_model, spec.d_model, bias=True)
            self.merge = nn.Linear(spec.d_model, spec.d_model, bias=True)
        self.router = LinearRouter(width, moe.experts, moe.top_k, moe.normalize_gates)
        self.experts = Experts(width, moe.d_expert, range(moe.experts) if held is None else held, moe.kernel)
        self.dispatch: Dispatch = dispatch_locally

    def forward(self, x_BTM: Tensor) -> tuple[Tensor, Routing]:
        x = self.head(x_BTM) if self.heads > 1 else x_BTM
        x_ND = x.reshape(-1, x.shape[-1] // self.heads)
        routing: Routing = self.router(x_ND)
        y = self.dispatch(x_ND, routing, self.experts).view_as(x)
        return (self.merge(y) if self.heads > 1 else y), routing
