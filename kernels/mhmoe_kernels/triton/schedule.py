"""Assignment of rows to programs, computed on the device of the routes so that the host never waits for a GPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_kernels.permutation import plan_routes


class Routes(NamedTuple):
    """Routes sorted by expert, as the kernels read them."""

    row_R: Tensor
    """Row of each sorted route."""
    slot_NK: Tensor
    """Position of each route of a row in the sorted order."""
    offset_E1: Tensor
    """Position of the first sorted route of each expert; the last entry is R."""


class RowTiles(NamedTuple):
    """Range start..end of sorted routes of one expert for each of T programs; a range with start >= end is empty."""

    expert_T: Tensor
    start_T: Tensor
    end_T: Tensor


def sort_routes(expert_NK: Tensor, n_experts: int) -> Routes:
    plan = plan_routes(expert_NK, n_experts)
    return Routes(plan.row_R, plan.slot_NK, torch.nn.functional.pad(plan.count_E.cumsum(0), (1, 0)))


def row_tiles(routes: Routes, block: int) -> RowTiles:
    """Return a tile for each program: up to `block` sorted routes of one expert.

    There are as many tiles as R routes can need at most, however they are distributed over experts; some may be empty.
    """
    n_experts, n_routes = len(routes.offset_E1) - 1, len(routes.row_R)
    tiles_E = (routes.offset_E1.diff() + block - 1) // block
    end_E = tiles_E.cumsum(0)
    # The host does not know the counts, so it launches the largest possible number of programs. The number of tiles
    # with rows, sum ceil(count / block), is at most (R + E (block - 1)) / block, and at most R.
    tile_T = torch.arange(min(n_routes, (n_routes + n_experts * (block - 1)) // block), device=end_E.device)
    expert_T = torch.searchsorted(end_E, tile_T, right=True).clamp(max=n_experts - 1)
    start_T = routes.offset_E1[expert_T] + (tile_T - (end_E - tiles_E)[expert_T]) * block
    return RowTiles(expert_T, start_T, torch.minimum(start_T + block, routes.offset_E1[expert_T + 1]))
