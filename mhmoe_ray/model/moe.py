"""The multi-head mixture-of-experts layer (MH-MoE); with h = 1, the plain sparse layer.

P1 is the first paper (arXiv 2404.15045, section 3.1), P2 the follow-up (arXiv 2411.16205, section 2.1).

    x (N, d) -> head projection -> split (N*h, D) -> router -> experts -> join (N, h*D) -> merge projection

The h sub-tokens of a token are neighbouring rows (token-major, head-minor). Their width D is d/h, or `d_sub_token`:
then the first layer of the head projection maps d to h*D values, and the last layer of the merge projection maps back
to d. With D = d, a multi-head layer can compute exactly what a plain layer with the same experts and router computes:
the head projection copies each token to its first sub-token, and the merge projection reads only that sub-token.

By default there is no residual around a sub-token, as in the authors' code and in P2. Equation 6 of P1 has one, which
the option `sub_token_residual` adds. P2 leaves open where a shared expert is; here it computes on whole tokens, before
the split into sub-tokens.

In training, dropout applies to the output of each expert, shared or routed, before gates and merge, as in the authors'
code. Each of a sub-token's k experts has its own mask. Projections and the layer's output have no dropout.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mhmoe_ray.model.feedforward import Dispatch, Experts, FeedForward, SharedExpert
from mhmoe_ray.model.linear import Linear, Projection
from mhmoe_ray.model.noise import dropout
from mhmoe_ray.model.router import BaseRouter, DomainRouter, Router, Routing, RoutingContext
from mhmoe_ray.spec import ModelSpec


def dispatch_locally(
    x_ND: Tensor, routing: Routing, experts: Experts, shared: SharedExpert | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run sub-tokens through experts that are all in this process; return each sub-token's sum of outputs weighted by
    gates, and the shared expert's output, if there is one."""
    y_ND = experts.compute(x_ND, routing.expert_NK, routing.gate_NK, routing.capacity)
    return y_ND, None if shared is None else shared.layer(shared.x_BTM)


def _build_projection(widths: Iterable[int]) -> nn.Module:
    """Return linear layers from each width to the next one, with ReLU between them."""
    # The layers have biases, as in the code of the MH-MoE authors, even where the rest of the model has none.
    linear_layers = [Linear(in_width, out_width) for in_width, out_width in pairwise(widths)]
    if len(linear_layers) == 1:
        return linear_layers[0]
    return Projection(*(module for layer in linear_layers for module in (layer, nn.ReLU())))[:-1]


BuildRouter = Callable[[ModelSpec], BaseRouter]


def build_router(spec: ModelSpec) -> BaseRouter:
    """Return the uninitialized router of one layer."""
    build: BuildRouter = spec.family.part("router")
    return build(spec)


def build_plain_router(spec: ModelSpec) -> BaseRouter:
    """Return a router that treats all rows of a layer alike."""
    assert spec.moe is not None
    return DomainRouter(spec.moe) if spec.moe.router == "domain" else Router(spec.row_width, spec.moe)


class MoELayer(nn.Module):
    """Mixture-of-experts layer of one block; the base class of all kinds."""

    router: BaseRouter
    experts: Experts
    dispatch: Dispatch  # sends sub-tokens to experts; expert parallelism replaces `dispatch_locally`


class MultiHeadMoE(MoELayer):
    """Layer that splits each token into sub-tokens and routes each to its top-k experts."""

    def __init__(self, spec: ModelSpec, expert_ids: range | None = None) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.heads, self.residual, self.dropout = moe.heads, moe.sub_token_residual, spec.dropout
        widths = spec.projection_widths
        self.head = _build_projection(widths) if moe.has_head_projection else Projection()
        self.router = build_router(spec)
        self.experts = Experts(spec, range(moe.experts) if expert_ids is None else expert_ids)
        self.merge = _build_projection(reversed(widths)) if moe.has_merge_projection else Projection()
        self.shared = FeedForward(spec, moe.d_shared) if moe.d_shared else None
        self.dispatch = dispatch_locally

    def forward(
        self,
        x_BTM: Tensor,
        generator: torch.Generator | None = None,
        domain_B: Tensor | None = None,
        group_tokens: Sequence[int] = (),
    ) -> tuple[Tensor, Routing]:
        """Return the output (B, T, M) and the routing; the generator is None in evaluation. Only router `domain` uses
        `domain_B`. `group_tokens` has the number of tokens of each modality or task."""
        x = self.head(x_BTM, generator)
        x_ND = x.reshape(-1, x.shape[-1] // self.heads)
        context = RoutingContext(len(x_BTM), domain_B, [count * self.heads for count in group_tokens])
        routing: Routing = self.router(x_ND, generator, context)
        # A dispatch between ranks computes the shared expert while sub-tokens travel between ranks.
        shared = None
        if self.shared is not None and self.dispatch is not dispatch_locally:
            shared = SharedExpert(self.shared, x_BTM)
        y_ND, shared_BTM = self._run_experts(x_ND, routing, generator, shared)
        if self.residual:
            y_ND = x_ND + y_ND
        y_BTM: Tensor = self.merge(y_ND.view_as(x), generator)
        if self.shared is not None:
            if shared_BTM is None:
                shared_BTM = self.shared(x_BTM)
            y_BTM = y_BTM + dropout(shared_BTM, self.dropout, generator)
        return y_BTM, routing

    def _run_experts(
        self, x_ND: Tensor, routing: Routing, generator: torch.Generator | None, shared: SharedExpert | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return sums of expert outputs weighted by gates, with dropout before gates, and the shared output."""
        if not self.dropout or generator is None:
            outputs: tuple[Tensor, Tensor | None] = self.experts(x_ND, routing, self.dispatch, shared)
            return outputs
        # Kernels and dispatch return weighted sums of expert outputs, but dropout applies to each output. So each route
        # (one choice of an expert by a sub-token) becomes a row of its own with weight 1, and its gate applies after
        # dropout. Experts compute as many rows as without dropout. Dropout masks are drawn here, on the rank of the
        # sub-token, so that they do not depend on the number of ranks.
        top_k = routing.expert_NK.shape[1]
        x_RD = x_ND[:, None].expand(-1, top_k, -1).flatten(0, 1)
        # A gate of 0 marks a dropped route, which must stay dropped.
        gate_R1 = (routing.gate_NK != 0).to(routing.gate_NK).view(-1, 1)
        single_routing = routing._replace(expert_NK=routing.expert_NK.view(-1, 1), gate_NK=gate_R1)
        out_RD, shared_BTM = self.experts(x_RD, single_routing, self.dispatch, shared)
        out_NKD = dropout(out_RD, self.dropout, generator).view(-1, top_k, x_ND.shape[1])
        return (out_NKD * routing.gate_NK[..., None]).sum(1).to(out_NKD.dtype), shared_BTM
