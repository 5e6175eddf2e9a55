"""Two readable kernels: `reference`, a loop over experts with masks in any dtype, and `capacity`, GShard's static
routing.

GShard's static routing as the papers ran it (arXiv 2006.16668): one-hot masks of N x E x C values lay rows out in E
buffers of C places and bring the outputs back. It is here for comparison: memory grows with N * E * C, which at a
capacity factor of 1 is about k * N^2, and every place is computed, whether taken or not.

An additional shape suffix: C places in an expert's buffer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.weights import ExpertWeights


def reference(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts: see `mhmoe_kernels.run_experts`. Tests compare the other kernels with it."""
    y_ND = torch.zeros_like(x_ND)
    for e in range(len(weights.stacked[0])):
        rows, choice = (expert_NK == e).nonzero(as_tuple=True)
        out = weights.function(x_ND[rows], *(w[e] for w in weights.stacked))
        y_ND = y_ND.index_add(0, rows, (out * gate_NK[rows, choice, None]).to(y_ND.dtype))
    return y_ND


def capacity(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights, *, places: int) -> Tensor:
    """Run routed rows through experts as in `mhmoe_kernels.run_experts`, with C = `places` slots per expert.

    A route with gate 0 takes no slot: routing has dropped it. First choices get slots before second ones, so no route
    that routing kept under this capacity is left without one.
    """
    experts, top_k, places = len(weights.stacked[0]), expert_NK.shape[1], max(1, places)  # no rows make no places
    kept_NK = gate_NK != 0
    chosen_NKE = F.one_hot(expert_NK, experts) * kept_NK[..., None]
    first_KNE = chosen_NKE.transpose(0, 1).reshape(-1, experts)  # all first choices, then all second ones
    place_KN = ((first_KNE.cumsum(0) - first_KNE) * first_KNE).sum(-1)
    place_NK = place_KN.view(top_k, -1).T
    fits_NK = kept_NK & (place_NK < places)
    at_NKC = F.one_hot(place_NK.clamp(max=places - 1), places) * fits_NK[..., None]
    # Each of the two masks is N x E x C; a row is at most once with an expert, so the sum over k loses nothing.
    chosen_NKE, at_NKC = chosen_NKE.to(x_ND), at_NKC.to(x_ND)
    combine_NEC = torch.einsum("nke,nkc,nk->nec", chosen_NKE, at_NKC, gate_NK.to(x_ND))
    dispatch_NEC = torch.einsum("nke,nkc->nec", chosen_NKE, at_NKC)
    x_ECD = torch.einsum("nec,nd->ecd", dispatch_NEC, x_ND)
    out_ECD = torch.stack([weights.function(x_ECD[e], *(w[e] for w in weights.stacked)) for e in range(experts)])
    return torch.einsum("nec,ecd->nd", combine_NEC, out_ECD)
