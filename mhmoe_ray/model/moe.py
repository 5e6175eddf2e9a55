"""The multi-head mixture-of-experts layer (P1, section 3.1; P2, section 2.1); with h = 1 the plain sparse one.

    x (N, d) -> head projection -> split (N*h, d/h) -> router -> experts -> join (N, d) -> merge projection

The h sub-tokens of a token are neighbouring rows (token-major, head-minor). By default there is no residual around a
sub-token: the block's own residual is the only one, as in the authors' code and P2; equation 6 of P1 prints one, which
is `sub_token_residual`. A shared expert, of which P2 leaves the place open, sees whole tokens before the split.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhmoe_ray.model.feedforward import Experts, FeedForward
from mhmoe_ray.model.router import Router, Routing
from mhmoe_ray.spec import ModelSpec

Dispatch = Callable[[Tensor, Routing, Experts], Tensor]
"""Brings routed rows to their experts and the combined outputs back: (x_ND, routing, experts) -> y_ND."""


def dispatch_locally(x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """All experts are here."""
    y_ND: Tensor = experts(x_ND, routing.expert_NK, routing.gate_NK)
    return y_ND


def _projection(width: int, layers: int) -> nn.Module:
    """d -> d with biases, which the authors' code has even where the rest of the model has none."""
    linear = [nn.Linear(width, width) for _ in range(layers)]
    if layers == 1:
        return linear[0]
    return nn.Sequential(*(part for one in linear for part in (one, nn.ReLU())))[:-1]


class MultiHeadMoE(nn.Module):
    def __init__(self, spec: ModelSpec, held: range | None = None) -> None:
        """Args:
        spec: its `moe` section must be present.
        held: the global ids of the experts that this process holds; all by default.
        """
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.heads, self.residual = moe.heads, moe.sub_token_residual
        self.head = _projection(spec.d_model, moe.projection_layers) if moe.has_head else nn.Identity()
        self.router = Router(spec.d_model // moe.heads, moe)
        self.experts = Experts(spec, range(moe.experts) if held is None else held)
        self.merge = _projection(spec.d_model, moe.projection_layers) if moe.has_merge else nn.Identity()
        self.shared = FeedForward(spec, moe.d_shared) if moe.d_shared else None
        self.dispatch: Dispatch = dispatch_locally

    def forward(self, x_BTM: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Routing]:
        """Args:
        x_BTM: tokens.
        generator: the router's randomness in training; none in evaluation.
        """
        x = self.head(x_BTM)
        x_ND = x.reshape(-1, x.shape[-1] // self.heads)
        routing: Routing = self.router(x_ND, generator)
        y_ND = self.dispatch(x_ND, routing, self.experts)
        if self.residual:
            y_ND = x_ND + y_ND
        y_BTM: Tensor = self.merge(y_ND.view_as(x))
        if self.shared is not None:
            y_BTM = y_BTM + self.shared(x_BTM)
        return y_BTM, routing
