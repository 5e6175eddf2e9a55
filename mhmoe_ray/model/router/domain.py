"""The router of DEMix layers (arXiv 2108.05036), without parameters. A document goes to the expert of its domain, its
source, which is known in training and validation; a sample has documents of one domain. For text of unknown origin,
`evaluate/mixture.py` weights all experts' predictions by posterior probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mhmoe_ray.model.router.balance import route_counts
from mhmoe_ray.model.router.top_k import Router, Routing
from mhmoe_ray.spec import MoESpec


class DomainRouter(Router):
    """Router that sends a sequence's rows to its domain's expert, with gate 1."""

    def __init__(self, moe: MoESpec) -> None:
        # The constructor of `Router` would create a module that computes scores, which this router does not need.
        nn.Module.__init__(self)
        self.moe = moe

    def forward(
        self,
        x_ND: Tensor,
        generator: torch.Generator | None = None,
        sequences: int = 1,
        domain_B: Tensor | None = None,
        group_rows: Sequence[int] = (),
    ) -> Routing:
        """Return the routing; sequences have equally many rows, one after another."""
        assert domain_B is not None, "router domain needs the domain of each sequence"
        expert_N1 = domain_B.repeat_interleave(len(x_ND) // sequences)[:, None]
        zero = torch.zeros((), device=x_ND.device)
        return Routing(
            expert_NK=expert_N1,
            gate_NK=torch.ones_like(expert_N1, dtype=torch.float32),
            balance_loss=zero,
            z_loss=zero,
            count_E=route_counts(expert_N1, self.moe.experts),
            dropped_routes=torch.zeros((), dtype=torch.int64, device=x_ND.device),
            capacity=None,
        )
