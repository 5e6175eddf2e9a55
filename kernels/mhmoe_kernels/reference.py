"""Two readable kernels: `reference`, a loop over experts in any dtype, and `capacity`, GShard's static routing.

Static routing follows the paper (arXiv 2006.16668), for comparison: one-hot masks of N x E x C values move rows into E
buffers of C slots and back. Its memory grows with N * E * C, which at a capacity factor of 1 is about k * N^2, and it
computes even empty slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.weights import ExpertWeights


def run_reference(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts, as `mhmoe_kernels.run_experts` does; tests compare other kernels with it."""
    y_ND = torch.zeros_like(x_ND)
    for e in range(len(weights.stacked[0])):
        rows, choice = (expert_NK == e).nonzero(as_tuple=True)
        out = weights.function(x_ND[rows], *(w[e] for w in weights.stacked))
        y_ND = y_ND.index_add(0, rows, (out * gate_NK[rows, choice, None]).to(y_ND.dtype))
    return y_ND


def run_capacity(
    x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights, *, expert_capacity: int
) -> Tensor:
    """Run `mhmoe_kernels.run_experts` with C = `expert_capacity` slots per expert.

    A route with gate 0 takes no slot, because the router has dropped it. First choices get slots before second choices,
    as in the router, so every route that the router kept under this capacity gets a slot.
    """
    # Without rows the capacity is 0, but the masks need at least one slot.
    n_experts, top_k, expert_capacity = len(weights.stacked[0]), expert_NK.shape[1], max(1, expert_capacity)
    kept_NK = gate_NK != 0
    chosen_NKE = F.one_hot(expert_NK, n_experts) * kept_NK[..., None]
    choice_KNE = chosen_NKE.transpose(0, 1).reshape(-1, n_experts)  # all first choices, then all second choices
    slot_KN = ((choice_KNE.cumsum(0) - choice_KNE) * choice_KNE).sum(-1)
    slot_NK = slot_KN.view(top_k, -1).T
    fits_NK = kept_NK & (slot_NK < expert_capacity)
    slot_NKC = F.one_hot(slot_NK.clamp(max=expert_capacity - 1), expert_capacity) * fits_NK[..., None]
    # The masks `combine_NEC` and `dispatch_NEC` are N x E x C. A row is routed to an expert at most once, so their sums
    # over the choices k merge no routes.
    chosen_NKE, slot_NKC = chosen_NKE.to(x_ND), slot_NKC.to(x_ND)
    combine_NEC = torch.einsum("nke,nkc,nk->nec", chosen_NKE, slot_NKC, gate_NK.to(x_ND))
    dispatch_NEC = torch.einsum("nke,nkc->nec", chosen_NKE, slot_NKC)
    x_ECD = torch.einsum("nec,nd->ecd", dispatch_NEC, x_ND)
    out_ECD = torch.stack([weights.function(x_ECD[e], *(w[e] for w in weights.stacked)) for e in range(n_experts)])
    return torch.einsum("nec,ecd->nd", combine_NEC, out_ECD)
