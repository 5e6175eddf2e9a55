"""Static routing: which routes fit into experts of limited capacity."""

import torch
from torch import Tensor


def fits(expert_NK: Tensor, wanted_NK: Tensor, experts: int, limit: int) -> Tensor:
    """Mask NK of the wanted routes that their experts take.

    Places are given in the order of rows, all first choices before all second ones, and so on; so a later row's first
    choice can push out an earlier row's second one, and static routing is not causal.
    """
    order_KN = torch.where(wanted_NK, expert_NK, experts).T.flatten()  # unwanted routes queue for no expert
    sorted_R, route_R = order_KN.sort(stable=True)
    start_E = torch.searchsorted(sorted_R, torch.arange(experts + 1, device=sorted_R.device))
    place_R = torch.empty_like(route_R)
    place_R[route_R] = torch.arange(len(route_R), device=route_R.device) - start_E[sorted_R]
    return wanted_NK & (limit > place_R.view(expert_NK.T.shape).T)
