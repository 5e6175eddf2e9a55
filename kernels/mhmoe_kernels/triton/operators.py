"""Launch of Triton kernels as operators of torch, and the operators that sort routes, move rows and update weights.

An operator allocates its results and launches its kernels; fake tensors and tracing pass through it without a GPU. Each
states the largest number of kernels that it launches, which never depends on values on the device.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mhmoe_kernels.operators import operator
from mhmoe_kernels.triton import adamw, rows, sort

Tensors = tuple[Tensor, ...]
_INTERPRETER_PROGRAMS = 4
"""Programs of a persistent kernel in Triton's interpreter, which runs them one after another."""


def launch(kernel: Any, grid: tuple[int, ...], fuses_additions: bool = True) -> Callable[..., Any]:
    """Return a function that launches a kernel on a grid.

    With `fuses_additions`, the compiler may round a product and a sum once instead of twice.
    """
    # True is Triton's default for `enable_fp_fusion`. It is set explicitly, because Triton warns that the default will
    # change.
    return partial(kernel[grid], enable_fp_fusion=fuses_additions)


class SortedRoutes(NamedTuple):
    """Routes sorted by expert and divided into tiles of one expert each, int32 on the device."""

    route_R: Tensor
    """Route of each slot (position in the sorted order); route r is choice r % K of row r // K."""
    slot_NK: Tensor
    """Slot of each of a row's K routes."""
    offset_E1: Tensor
    """First slot of each expert; the last entry is R."""
    expert_T: Tensor
    """Expert of each tile; E marks a tile that is not needed."""
    start_T: Tensor
    """First slot of each tile."""

    def counts(self, n_experts: int) -> Tensor:
        """Return count_E, the routes of each of the first `n_experts` experts, int64."""
        first_E, end_E = self.offset_E1[:n_experts], self.offset_E1[1 : n_experts + 1]
        return torch.sub(end_E, first_E, out=torch.empty_like(end_E, dtype=torch.int64))

    def gather(self, x_ND: Tensor) -> Tensor:
        """Return x_RD, the row of each sorted route."""
        x_RD: Tensor = gather_rows(x_ND.contiguous(), self.route_R, self.slot_NK.shape[1])
        return x_RD

    def add(self, x_RD: Tensor) -> Tensor:
        """Return the sum of each row's routes."""
        sum_ND: Tensor = combine_rows(x_RD.contiguous(), None, self.slot_NK, None)
        return sum_ND

    def by_route(self) -> "SortedRoutes":
        """Return the same order with each route as a row of its own."""
        return self._replace(slot_NK=self.slot_NK.view(-1, 1))

    def trimmed(self, routes: int) -> "SortedRoutes":
        """Return what `RoutePlan.trimmed` does, with the tiles of all routes."""
        return self._replace(route_R=self.route_R[: routes + 1], slot_NK=self.slot_NK.clamp(max=routes))


def sorted_routes(expert_NK: Tensor | SortedRoutes, experts: int, rows_per_tile: int) -> SortedRoutes:
    """Return routes sorted by expert in tiles of up to `rows_per_tile` rows; sorted ones have such tiles already."""
    if isinstance(expert_NK, SortedRoutes):
        return expert_NK
    return SortedRoutes(*sort_routes(expert_NK, experts, rows_per_tile))


def split(tensors: Sequence[Tensor], first_length: int, second_length: int) -> tuple[Tensors, Tensors, Tensors]:
    """Split the tensors that an autograd function saved into three tuples."""
    third_start = first_length + second_length
    return tuple(tensors[:first_length]), tuple(tensors[first_length:third_start]), tuple(tensors[third_start:])


def tile_limit(routes: int, experts: int, rows_per_tile: int) -> int:
    """Return the largest number of tiles of sorted routes, for any distribution over experts."""
    return min(routes, (routes + experts * (rows_per_tile - 1)) // rows_per_tile)


@cache
def program_count(device: torch.device) -> int:
    """Return the programs of a persistent kernel, one for each multiprocessor of a GPU."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def device_capability(device: torch.device) -> int:
    """Return a GPU's compute capability without its dot, such as 90; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _row_grid(count: int, width: int) -> tuple[tuple[int, int], int, int]:
    """Return the launch grid of a kernel that moves rows, and its block's rows and columns."""
    # Padding the block to a power of two is free: memory bandwidth limits the kernel, and masked lanes move no bytes.
    columns = min(256, triton.next_power_of_2(width))
    block_rows = max(1, 4096 // columns)
    return (triton.cdiv(count, block_rows), triton.cdiv(width, columns)), block_rows, columns


def _empty_tiles(device_tensor: Tensor, routes: int, experts: int, rows_per_tile: int) -> tuple[Tensor, Tensor]:
    tiles = tile_limit(routes, experts, rows_per_tile)
    expert_T, start_T = (device_tensor.new_empty(tiles, dtype=torch.int32) for _ in range(2))
    return expert_T, start_T


def _empty_routes(device_tensor: Tensor, rows: int, top_k: int, experts: int, rows_per_tile: int) -> SortedRoutes:
    routes = rows * top_k
    return SortedRoutes(
        device_tensor.new_empty(routes, dtype=torch.int32),
        device_tensor.new_empty(rows, top_k, dtype=torch.int32),
        device_tensor.new_empty(experts + 1, dtype=torch.int32),
        *_empty_tiles(device_tensor, routes, experts, rows_per_tile),
    )


def _empty_sort(expert_NK: Tensor, experts: int, rows_per_tile: int, by_choice: bool = False) -> SortedRoutes:
    rows, top_k = expert_NK.shape
    return _empty_routes(expert_NK, rows, top_k, experts, rows_per_tile)


@operator(launches=4, fake=_empty_sort)
def sort_routes(
    expert_NK: Tensor, experts: int, rows_per_tile: int, by_choice: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort routes (int64) by expert, in stable order, and return the fields of `SortedRoutes`.

    With `by_choice`, routes are numbered by choice: all first choices come before the second ones, also in `slot_NK`.
    """
    results = _empty_sort(expert_NK, experts, rows_per_tile)
    routes = expert_NK.numel()
    if not routes:
        results.offset_E1.zero_()
        return results
    expert_NK = expert_NK.contiguous()
    blocks = triton.cdiv(routes, sort.ROUTES_PER_BLOCK)
    bins = max(16, triton.next_power_of_2(experts + 1))
    count_BE, before_BE = (expert_NK.new_empty(blocks, experts, dtype=torch.int32) for _ in range(2))
    total_E = expert_NK.new_empty(experts, dtype=torch.int32)
    launch(sort.count_routes, (blocks,))(
        expert_NK, count_BE, routes, experts, expert_NK.shape[1], by_choice, sort.ROUTES_PER_BLOCK, bins
    )
    launch(sort.add_counts, (triton.cdiv(experts, 16),))(count_BE, before_BE, total_E, blocks, experts, 128, 16)
    _launch_schedule(total_E, *results[2:], rows_per_tile)
    launch(sort.place_routes, (blocks,))(
        expert_NK, before_BE, results.offset_E1, results.route_R, results.slot_NK, routes, experts,
        expert_NK.shape[1], by_choice, sort.ROUTES_PER_BLOCK,
    )  # fmt: skip
    return results


@operator(
    launches=1,
    fake=lambda count_E, routes, rows_per_tile: (
        count_E.new_empty(len(count_E) + 1),
        *_empty_tiles(count_E, routes, len(count_E), rows_per_tile),
    ),
)
def schedule_tiles(count_E: Tensor, routes: int, rows_per_tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Divide rows that are sorted by expert into tiles; return offset_E1, expert_T and start_T of `SortedRoutes`.

    `count_E` is int32.
    """
    offset_E1 = count_E.new_empty(len(count_E) + 1)
    expert_T, start_T = _empty_tiles(count_E, routes, len(count_E), rows_per_tile)
    _launch_schedule(count_E, offset_E1, expert_T, start_T, rows_per_tile)
    return offset_E1, expert_T, start_T


def _launch_schedule(count_E: Tensor, offset_E1: Tensor, expert_T: Tensor, start_T: Tensor, rows_per_tile: int) -> None:
    # At least one program must run, because the first one stores the offsets.
    grid = (max(1, triton.cdiv(len(expert_T), 32)),)
    experts = len(count_E)
    launch(sort.schedule_tiles, grid)(
        count_E, offset_E1, expert_T, start_T, len(expert_T), experts, rows_per_tile, 32,
        max(16, triton.next_power_of_2(experts)),
    )  # fmt: skip


@operator(
    launches=2,
    fake=lambda received_PX, rows, rows_per_tile: _empty_routes(
        received_PX, rows, 1, received_PX.shape[1], rows_per_tile
    ),
)
def sort_received(received_PX: Tensor, rows: int, rows_per_tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort rows by expert that P ranks sent, each its own rows by expert, and return the fields of `SortedRoutes`.

    `received_PX` counts each rank's rows for each expert, int64; a row is a route of its own.
    """
    ranks, experts = received_PX.shape
    results = _empty_routes(received_PX, rows, 1, experts, rows_per_tile)
    total_E = received_PX.new_empty(experts, dtype=torch.int32)
    # Several programs share a long run of rows, so that an expert that gets most rows does not delay the kernel.
    programs = min(16, max(1, triton.cdiv(rows, 256)))
    launch(sort.place_received, (ranks * experts, programs))(
        received_PX, results.route_R, results.slot_NK, total_E, experts, ranks * experts, 256,
        max(16, triton.next_power_of_2(ranks * experts)),
    )  # fmt: skip
    _launch_schedule(total_E, *results[2:], rows_per_tile)
    return results


@operator(launches=1, fake=lambda x_ND, route_R, top_k: x_ND.new_empty(len(route_R), x_ND.shape[1]))
def gather_rows(x_ND: Tensor, route_R: Tensor, top_k: int) -> Tensor:
    """Return x_RD, the row of each sorted route."""
    routes, width = len(route_R), x_ND.shape[1]
    x_RD = x_ND.new_empty(routes, width)
    if routes:
        grid, block_rows, columns = _row_grid(routes, width)
        launch(rows.gather_rows, grid)(x_ND, route_R, x_RD, routes, width, top_k, block_rows, columns)
    return x_RD


@operator(launches=1, fake=lambda out_RD, second_RD, slot_NK, gate_NK: out_RD.new_empty(len(slot_NK), out_RD.shape[1]))
def combine_rows(out_RD: Tensor, second_RD: Tensor | None, slot_NK: Tensor, gate_NK: Tensor | None) -> Tensor:
    """Return y_n = sum_k gate_nk * (out + second)[slot_nk], added in float32.

    Without gates, this is the gradient of `gather_rows`.
    """
    (count, top_k), width = slot_NK.shape, out_RD.shape[1]
    y_ND = out_RD.new_empty(count, width)
    if count:
        grid, block_rows, columns = _row_grid(count, width)
        # The kernel needs a pointer for each argument. For a missing tensor it gets the pointer of another one, but
        # does not read it.
        second, gates = (out_RD if tensor is None else tensor for tensor in (second_RD, gate_NK))
        launch(rows.combine_rows, grid)(
            out_RD, second, slot_NK, gates, y_ND, count, width, top_k, second_RD is not None, gate_NK is not None,
            block_rows, columns,
        )  # fmt: skip
    return y_ND


@operator(launches=1, fake=lambda *_: None, changed_arguments=("weight_V", "mean_V", "square_V"))
def rounded_adamw(
    weight_V: Tensor, gradient_V: Tensor, mean_V: Tensor, square_V: Tensor, offset: int, key: int, updates: int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Do update number `updates` + 1 of contiguous float32 weights with moments in bfloat16."""
    values = weight_V.numel()
    if values:
        step = updates + 1
        launch(adamw.update, (triton.cdiv(values, 1024),), fuses_additions=False)(
            weight_V, gradient_V, mean_V, square_V, values, offset, key, 1 - lr * weight_decay,
            lr / (1 - beta1**step), 1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), eps, 1024,
        )  # fmt: skip
