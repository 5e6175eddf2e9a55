"""Routing by fused kernels: the operators that launch them, and the autograd function."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.operators import operator
from mhmoe_kernels.triton import router
from mhmoe_kernels.triton.grouped.blocks import column_block
from mhmoe_kernels.triton.operators import SortedRoutes, launch, program_count, sort_routes


def _row_blocks(experts: int, values: int) -> tuple[int, int]:
    """Return the rows and columns of a block of up to `values` logits."""
    columns = max(16, triton.next_power_of_2(experts))
    return max(1, values // columns), columns


_ProductSizes = tuple[int | None, int, int | None]
"""M, N and K of a product of M x K and K x N values; None is the number of rows."""


def product_constants(sizes: _ProductSizes, transposed: tuple[bool, bool]) -> dict[str, Any]:
    """Return the constants and compiler options of kernel `multiply`; `transposed` says which operands are."""
    m_size, n_size, k_size = sizes
    return {
        "M": m_size, "N": n_size, "K": k_size, "A_TRANSPOSED": transposed[0], "B_TRANSPOSED": transposed[1],
        "BLOCK_M": 128 if m_size is None else column_block(m_size, 128), "BLOCK_N": column_block(n_size, 128),
        "BLOCK_K": 32, "num_warps": 8,
    }  # fmt: skip


def _launch_product(
    a: Tensor, b: Tensor, c: Tensor, sizes: _ProductSizes, transposed: tuple[bool, bool], rows: int, parts: int = 1
) -> None:
    constants = product_constants(sizes, transposed)
    m_size, n_size, k_size = (rows if size is None else size for size in sizes)
    blocks = triton.cdiv(m_size, constants["BLOCK_M"]) * triton.cdiv(n_size, constants["BLOCK_N"])
    part_blocks = triton.cdiv(triton.cdiv(k_size, constants["BLOCK_K"]), parts)
    launch(router.multiply, (blocks, parts))(a, b, c, rows, part_blocks, **constants)


@operator(
    launches=1,
    fake=lambda x_NI, w_ED, transposed, dtype: x_NI.new_empty(len(x_NI), w_ED.shape[not transposed], dtype=dtype),
)
def row_product(x_NI: Tensor, w_ED: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Return x @ w, or x @ w^T, of at least one row, about as exact as in float32."""
    (rows, terms), columns = x_NI.shape, w_ED.shape[not transposed]
    y_NO = x_NI.new_empty(rows, columns, dtype=dtype)
    _launch_product(x_NI, w_ED, y_NO, (None, columns, terms), (False, transposed), rows)
    return y_NO


@operator(launches=3, fake=lambda y_NE, x_ND, dtype: x_ND.new_empty(y_NE.shape[1], x_ND.shape[1], dtype=dtype))
def row_outer(y_NE: Tensor, x_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """Return y^T @ x of at least one row, about as exact as in float32."""
    (rows, experts), width = y_NE.shape, x_ND.shape[1]
    # The result has few blocks. So that all multiprocessors compute, the rows are divided into parts.
    parts = min(triton.cdiv(rows, 1024), 32)
    dw_PED = x_ND.new_empty(parts, experts, width, dtype=torch.float32)
    _launch_product(y_NE, x_ND, dw_PED, (experts, width, None), (True, False), rows, parts)
    return dw_PED.sum(0).to(dtype)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        logits_NE: Tensor = row_product(x_ND, weight_ED, True, torch.float32)
        return logits_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_NE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ND, weight_ED = ctx.saved_tensors
        dlogits_NE = dlogits_NE.contiguous()
        dx_ND = row_product(dlogits_NE, weight_ED, False, x_ND.dtype) if ctx.needs_input_grad[0] else None
        dweight_ED = row_outer(dlogits_NE, x_ND, weight_ED.dtype) if ctx.needs_input_grad[1] else None
        return dx_ND, dweight_ED


logits: Callable[[Tensor, Tensor], Tensor] = _Logits.apply
"""Function with gradients that returns the logits of contiguous rows for a router's contiguous matrix."""

_Routed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""First five fields of `FusedRouting`, each row's log-sum-exp, and each expert's share of the choices."""


def _empty_routing(logits_NE: Tensor, top_k: int, normalized: bool, scale: float, counts_first: bool) -> _Routed:
    rows, experts = logits_NE.shape
    return (
        logits_NE.new_empty(rows, top_k, dtype=torch.int64),
        logits_NE.new_empty(rows, top_k),
        logits_NE.new_empty(()),
        logits_NE.new_empty(()),
        logits_NE.new_empty(experts, dtype=torch.int64),
        logits_NE.new_empty(rows),
        logits_NE.new_empty(experts),
    )


@operator(launches=2, fake=_empty_routing)
def _route(logits_NE: Tensor, top_k: int, normalized: bool, scale: float, counts_first: bool) -> _Routed:
    """Route at least one row; the logits are float32 and contiguous, other arguments those of `fused_routing`."""
    rows, experts = logits_NE.shape
    results = expert_NK, gate_NK, balance, z, count_E, log_sum_N, share_E = _empty_routing(
        logits_NE, top_k, normalized, scale, counts_first
    )
    block_rows, columns = _row_blocks(experts, 4096)
    # Four programs for each multiprocessor hide the latency of memory.
    programs = min(triton.cdiv(rows, block_rows), 4 * program_count(logits_NE.device))
    probability_PE = logits_NE.new_empty(programs, experts)
    first_PE, count_PE = (logits_NE.new_empty(programs, experts, dtype=torch.int32) for _ in range(2))
    z_P = logits_NE.new_empty(programs)
    launch(router.route_rows, (programs,))(
        logits_NE, expert_NK, gate_NK, log_sum_N, probability_PE, first_PE, count_PE, z_P, rows, scale,
        experts, top_k, normalized, block_rows, columns, triton.next_power_of_2(top_k),
    )  # fmt: skip
    launch(router.sum_programs, (1,))(
        probability_PE, first_PE, count_PE, z_P, share_E, count_E, balance, z, programs, rows,
        experts, top_k, counts_first, max(1, 8192 // columns), columns,
    )  # fmt: skip
    return results


@operator(launches=1, fake=lambda logits_NE, *_: torch.empty_like(logits_NE))
def _route_backward(
    logits_NE: Tensor, expert_NK: Tensor, gate_NK: Tensor, log_sum_N: Tensor, share_E: Tensor, dgate_NK: Tensor,
    dbalance: Tensor, dz: Tensor, kept_NK: Tensor | None, normalized: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits; `kept_NK` is the mask of routes that were kept."""
    rows, experts = logits_NE.shape
    dlogits_NE = torch.empty_like(logits_NE)
    # With larger blocks the kernel would need more registers than there are, and spill them to memory.
    block_rows, columns = _row_blocks(experts, 2048)
    launch(router.route_rows_backward, (triton.cdiv(rows, block_rows),))(
        logits_NE, expert_NK, gate_NK, log_sum_N, share_E, dgate_NK, dbalance, dz,
        dgate_NK if kept_NK is None else kept_NK, dlogits_NE, rows, scale,
        experts, expert_NK.shape[1], normalized, kept_NK is not None, block_rows, columns,
    )  # fmt: skip
    return dlogits_NE


_KeptRoutes = tuple[Tensor, Tensor, Tensor, Tensor]
"""New gates, the mask of kept routes, their number per expert, and the number of dropped ones."""


def _empty_drops(expert_NK: Tensor, gate_NK: Tensor, experts: int, capacity: int) -> _KeptRoutes:
    return (
        torch.empty_like(gate_NK),
        torch.empty_like(gate_NK, dtype=torch.bool),
        expert_NK.new_empty(experts),
        expert_NK.new_empty(()),
    )


@operator(launches=5, fake=_empty_drops)
def _drop_routes(expert_NK: Tensor, gate_NK: Tensor, experts: int, capacity: int) -> _KeptRoutes:
    """Set the gates of routes beyond the expert capacity to 0."""
    results = kept_gate_NK, kept_NK, count_E, dropped = _empty_drops(expert_NK, gate_NK, experts, capacity)
    # Only the order of the routes is needed here, and not the tiles of rows, so the tile size (128) does not matter.
    routes = SortedRoutes(*sort_routes(expert_NK, experts, 128, by_choice=True))
    rows, top_k = expert_NK.shape
    launch(router.drop_routes, (triton.cdiv(rows * top_k, 1024),))(
        expert_NK, gate_NK, routes.slot_NK, routes.offset_E1, kept_gate_NK, kept_NK, count_E, dropped, rows, capacity,
        experts, top_k, 1024, max(16, triton.next_power_of_2(experts)),
    )  # fmt: skip
    return results


class _Routing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NE: Tensor,
        top_k: int,
        capacity: int | None,
        normalized: bool,
        scale: float,
        counts_first: bool,
    ) -> tuple[Tensor, ...]:
        logits_NE = logits_NE.contiguous()
        expert_NK, gate_NK, balance_loss, z_loss, count_E, *statistics = _route(
            logits_NE, top_k, normalized, scale, counts_first
        )
        ctx.normalized, ctx.scale = normalized, scale
        ctx.set_materialize_grads(False)
        if capacity is None:
            ctx.save_for_backward(logits_NE, expert_NK, gate_NK, *statistics)
            dropped_routes = count_E.new_zeros(())
        else:
            gates = gate_NK
            gate_NK, kept_NK, count_E, dropped_routes = _drop_routes(expert_NK, gates, logits_NE.shape[1], capacity)
            ctx.save_for_backward(logits_NE, expert_NK, gates, *statistics, kept_NK)
        ctx.mark_non_differentiable(expert_NK, count_E, dropped_routes)
        return expert_NK, gate_NK, balance_loss, z_loss, count_E, dropped_routes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_NE, expert_NK, gate_NK, log_sum_N, share_E, *masks = ctx.saved_tensors
        _, dgate_NK, dbalance, dz, *_ = gradients
        if dgate_NK is None:
            dgate_NK = torch.zeros_like(gate_NK)
        dbalance, dz = (logits_NE.new_zeros(()) if d is None else d for d in (dbalance, dz))
        dlogits_NE = _route_backward(
            logits_NE, expert_NK, gate_NK, log_sum_N, share_E, dgate_NK.contiguous(), dbalance, dz,
            masks[0] if masks else None, ctx.normalized, ctx.scale,
        )  # fmt: skip
        return dlogits_NE, None, None, None, None, None


route: Callable[[Tensor, int, int | None, bool, float, bool], tuple[Tensor, ...]] = _Routing.apply
"""Function with gradients that returns the fields of `FusedRouting` for the arguments of `fused_routing`."""
