"""For inference on CPUs: each expert runs on a number of rows that is rounded up, so that what a row gives depends on
no other row.

BLAS adds up a product of few rows in another order than one of more (OpenBLAS and MKL on AMD's CPUs fewer than four,
MKL on Intel's fewer than sixteen), and gives each thread a part of the rows. So a row alone would get other last bits
than the same row among others, and a near-tie another token. Not so in products of a multiple of sixteen rows, but for
MKL's with sums over a thousand values and more and few outputs, which it splits among threads; a torch with MKL has
oneDNN too, and packs its matrices instead (packed.py).
"""

import torch
from torch import Tensor

from mhmoe_kernels.permute import combine, plan_routes
from mhmoe_kernels.weights import ExpertWeights

MULTIPLE = 16


def padded(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """See `mhmoe_kernels.run_experts`; without a backward. Experts without rows are not touched."""
    assert not (torch.is_grad_enabled() and any(w.requires_grad for w in weights.stacked))
    plan = plan_routes(expert_NK, len(weights.stacked[0]))
    room_E = (plan.count_E + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    # How much farther a route lies than without the room before it.
    ahead_E = (room_E - plan.count_E).cumsum(0) - (room_E - plan.count_E)
    plan = plan._replace(slot_NK=plan.slot_NK + ahead_E[expert_NK])
    rooms = room_E.tolist()
    row_P = torch.zeros(sum(rooms), dtype=torch.long, device=x_ND.device)  # any row fills the rest
    row_P[plan.slot_NK] = torch.arange(len(x_ND), device=x_ND.device)[:, None]
    experts = zip(*(w.unbind(0) for w in weights.stacked), strict=True)
    parts = zip(torch.split(x_ND.index_select(0, row_P), rooms), experts, rooms, strict=True)
    out = [weights.function(x, *expert) for x, expert, room in parts if room]
    return combine(torch.cat(out) if out else x_ND.new_empty(0, x_ND.shape[1]), gate_NK, plan)
