"""The multi-head mixture-of-experts layer (P1, section 3.1; P2, section 2.1); with h = 1, the plain sparse layer.

    x (N, d) -> head projection -> split (N*h, d/h) -> router -> experts -> join (N, d) -> merge projection

The h sub-tokens of a token are neighbouring rows (token-major, head-minor). By default there is no residual connection
around a sub-token: the block's own residual is the only one, as in the authors' code and in P2. Equation 6 of P1 prints
one, which the option `sub_token_residual` adds. A shared expert, whose position P2 leaves open, sees whole tokens
before the split.

In training, dropout applies to the output of each expert, shared or routed, before gates and merge, as in the authors'
code: each of a sub-token's k experts gets its own mask. There is no dropout around the projections, nor on the output
of the layer as a whole. Masks are drawn on the rank of the sub-token, in the order of its micro-batch's rows, never on
the rank of its expert.
"""

import torch
from torch import Tensor, nn

from mhmoe_ray.model.feedforward import Dispatch, Experts, FeedForward
from mhmoe_ray.model.noise import dropout
from mhmoe_ray.model.router import Router, Routing
from mhmoe_ray.spec import ModelSpec


def dispatch_locally(x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Run rows through the experts when this process holds all of them."""
    return experts.compute(x_ND, routing.expert_NK, routing.gate_NK, routing.places)


def _projection(width: int, layers: int) -> nn.Module:
    """Return a projection d -> d with biases, which the authors' code has even where the rest of the model has none.

    Several layers have ReLU between them.
    """
    linear = [nn.Linear(width, width) for _ in range(layers)]
    if layers == 1:
        return linear[0]
    return nn.Sequential(*(part for one in linear for part in (one, nn.ReLU())))[:-1]


class MultiHeadMoE(nn.Module):
    """Multi-head mixture-of-experts layer of one block.

    `dispatch` brings rows to their experts; expert parallelism replaces it.
    """

    def __init__(self, spec: ModelSpec, held: range | None = None) -> None:
        """Create the layer with uninitialized weights.

        Args:
            spec: model spec; its `moe` section must be present.
            held: global ids of the experts that this process holds; by default all.
        """
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.heads, self.residual, self.dropout = moe.heads, moe.sub_token_residual, spec.dropout
        self.head = _projection(spec.d_model, moe.projection_layers) if moe.has_head else nn.Identity()
        self.router = Router(spec.d_model // moe.heads, moe)
        self.experts = Experts(spec, range(moe.experts) if held is None else held)
        self.merge = _projection(spec.d_model, moe.projection_layers) if moe.has_merge else nn.Identity()
        self.shared = FeedForward(spec, moe.d_shared) if moe.d_shared else None
        self.dispatch: Dispatch = dispatch_locally

    def forward(self, x_BTM: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Routing]:
        """Return the output (B, T, M) of the layer, and its routing.

        Args:
            x_BTM: the tokens.
            generator: source of the router's randomness and of dropout in training; None in evaluation.
        """
        x = self.head(x_BTM)
        x_ND = x.reshape(-1, x.shape[-1] // self.heads)
        routing: Routing = self.router(x_ND, generator)
        y_ND = self._through_experts(x_ND, routing, generator)
        if self.residual:
            y_ND = x_ND + y_ND
        y_BTM: Tensor = self.merge(y_ND.view_as(x))
        if self.shared is not None:
            y_BTM = y_BTM + dropout(self.shared(x_BTM), self.dropout, generator)
        return y_BTM, routing

    def _through_experts(self, x_ND: Tensor, routing: Routing, generator: torch.Generator | None) -> Tensor:
        if not self.dropout or generator is None:
            y_ND: Tensor = self.experts(x_ND, routing, self.dispatch)
            return y_ND
        # Backends and dispatch give back weighted sums. So each route goes as a row of its own with weight 1, and is
        # weighted after its dropout; the rows that experts see, and ranks exchange, are as many as before.
        top_k = routing.expert_NK.shape[1]
        x_RD = x_ND[:, None].expand(-1, top_k, -1).flatten(0, 1)
        gate_R1 = (routing.gate_NK != 0).to(routing.gate_NK).view(-1, 1)  # a dropped route stays dropped
        routes = routing._replace(expert_NK=routing.expert_NK.view(-1, 1), gate_NK=gate_R1)
        out_NKD = dropout(self.experts(x_RD, routes, self.dispatch), self.dropout, generator).view(
            -1, top_k, x_ND.shape[1]
        )
        return (out_NKD * routing.gate_NK[..., None]).sum(1).to(out_NKD.dtype)
