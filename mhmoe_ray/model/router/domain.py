"""The router of DEMix layers (arXiv 2108.05036), without parameters. A document goes to the expert of its domain, its
source, which is known in training and validation; a sample has documents of one domain. For text of unknown origin,
`evaluate/mixture.py` weights all experts' predictions by posterior probabilities."""

import torch
from torch import Tensor

from mhmoe_ray.model.router.balance import route_counts
from mhmoe_ray.model.router.base import NO_CONTEXT, BaseRouter, Routing, RoutingContext, routing_without_losses


class DomainRouter(BaseRouter):
    """Router that sends a sequence's rows to its domain's expert, with gate 1."""

    def forward(
        self, x_ND: Tensor, generator: torch.Generator | None = None, context: RoutingContext = NO_CONTEXT
    ) -> Routing:
        """Return the routing; sequences have equally many rows, one after another."""
        assert context.domain_B is not None, "router domain needs the domain of each sequence"
        expert_N1 = context.domain_B.repeat_interleave(len(x_ND) // context.sequences)[:, None]
        gate_N1 = torch.ones_like(expert_N1, dtype=torch.float32)
        return routing_without_losses(expert_N1, gate_N1, route_counts(expert_N1, self.moe.experts))
