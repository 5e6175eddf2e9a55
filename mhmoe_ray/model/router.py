"""The linear softmax router and its balance loss."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """Where N rows go."""

    expert_NK: Tensor
    """int64; first choice first, no expert twice in a row."""
    gate_NK: Tensor
    """float32 weights of the chosen experts."""
    balance_loss: Tensor
    """Scalar; 1 when routing is uniform."""
    count_E: Tensor
    """Routes per expert over all k choices, int64."""


class LinearRouter(nn.Module):
    """softmax(W x) over E experts, then the top k (P1, equation 5; P2, section 2.1). Always computed in float32."""

    def __init__(self, width: int, experts: int, top_k: int, normalize_gates: bool) -> None:
        super().__init__()
        self.top_k, self.normalize_gates = top_k, normalize_gates
        self.weight_ED = nn.Parameter(torch.empty(experts, width))

    def forward(self, x_ND: Tensor) -> Routing:
        with torch.autocast(x_ND.device.type, enabled=False):
            weight_ED = self.weight_ED
            probability_NE = (x_ND.to(weight_ED.dtype) @ weight_ED.T).softmax(-1)
        gate_NK, expert_NK = probability_NE.topk(self.top_k, dim=-1)
        if self.normalize_gates:
            gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
        experts = weight_ED.shape[0]
        count_E = torch.bincount(expert_NK.flatten(), minlength=experts)
        return Routing(expert_NK, gate_NK, balance_loss(probability_NE, expert_NK[:, 0]), count_E)


def balance_loss(probability_NE: Tensor, first_N: Tensor) -> Tensor:
    """E * sum_e mean_n(p_ne) * share of rows whose first choice is e.

    The form that both papers' code uses (METHOD: first choices only, before any drop). It is 1 when either factor is
    uniform, at most E, and its gradient flows through the probabilities alone.
    """
    rows, experts = probability_NE.shape
    share_E = torch.bincount(first_N, minlength=experts).to(probability_NE.dtype) / rows
    return experts * (probability_NE.mean(0) * share_E).sum()
