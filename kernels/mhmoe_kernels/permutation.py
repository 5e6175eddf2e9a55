"""Sorting of routes by expert, and its inverse. A route is one choice of an expert by a row.

Both directions, forward and backward, only gather rows, without scatter-add.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from mhmoe_kernels.triton.operators import SortedRoutes


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    # bfloat16 is too narrow for routing: different scores become equal, and sums over experts lose the differences from
    # which routing learns.
    return x if x.dtype == torch.float64 else x.float()


def copy_to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from CPU memory to a device without waiting for a GPU."""
    pinned_numbers = numbers.pin_memory() if device.type == "cuda" else numbers
    return pinned_numbers.to(device, non_blocking=True)


CACHE_VALUES = 1 << 17
"""Float32 values of a block, of which a few fit into a CPU's cache."""


class RoutePlan(NamedTuple):
    """Permutation that sorts the R = N * K routes by expert, and those of one expert by row."""

    row_R: Tensor
    """Row of each sorted route."""
    slot_NK: Tensor
    """Position of each route in the sorted order."""
    count_E: Tensor
    """Routes per expert."""

    def gather(self, x_ND: Tensor) -> Tensor:
        """Return x_RD, the row of each sorted route."""
        # x_ND[row_R] would be several times slower than `index_select` on a CPU.
        return x_ND.index_select(0, self.row_R)

    def counts(self, n_experts: int) -> Tensor:
        """Return the routes of each of the first `n_experts` experts."""
        return self.count_E[:n_experts]

    def add(self, x_RD: Tensor) -> Tensor:
        """Return the sum of each row's routes."""
        return F.embedding_bag(self.slot_NK, x_RD, mode="sum")

    def trimmed(self, routes: int) -> "RoutePlan":
        """Return a plan in which all sorted routes after the first `routes` ones share a single slot.

        Their gates must be 0. `permute` copies one of their rows to that slot. The caller must write zeros to the slot
        in the outputs, before `combine`, and in the gradient of the result of `permute`.
        """
        return RoutePlan(self.row_R[: routes + 1], self.slot_NK.clamp(max=routes), self.count_E)


Plan: TypeAlias = "RoutePlan | SortedRoutes"


def plan_routes(expert_NK: Tensor, n_experts: int) -> RoutePlan:
    """Return the plan that sorts routes by expert; `expert_NK` is int64."""
    flat_R = expert_NK.flatten()
    order_R = torch.argsort(flat_R, stable=True)
    slot_R = torch.empty_like(order_R)
    slot_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    # bincount is not used, because it would make the host wait for a GPU.
    end_E = torch.searchsorted(flat_R[order_R], torch.arange(n_experts, device=flat_R.device), right=True)
    count_E = end_E.diff(prepend=end_E.new_zeros(1))
    return RoutePlan(order_R // expert_NK.shape[1], slot_R.view_as(expert_NK), count_E)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return plan.gather(x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.add(grad_RD), None


class _AddRoutes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return plan.add(x_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.gather(grad_ND), None


permute: Callable[[Tensor, Plan], Tensor] = _Permute.apply
"""Function (x_ND, plan) -> x_RD, the row of each route, sorted by expert."""
add_routes: Callable[[Tensor, Plan], Tensor] = _AddRoutes.apply
"""Function (x_RD, plan) -> sum_ND, the sum of each row's routes, like `combine` with gates of 1."""


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, gate_NK: Tensor, plan: RoutePlan) -> Tensor:
        ctx.save_for_backward(out_RD, gate_NK)
        ctx.plan = plan
        # embedding_bag gathers rows, multiplies them by weights and adds them in float32 in one pass, but the weights
        # must have the dtype of the rows. A gate is therefore split into two parts: its value in that dtype, and the
        # rounding error.
        rounded_NK = gate_NK.to(out_RD.dtype)
        slot_NK, parts_NK = plan.slot_NK, rounded_NK
        if rounded_NK.dtype.itemsize < gate_NK.dtype.itemsize:
            slot_NK = torch.cat([slot_NK, slot_NK], 1)
            parts_NK = torch.cat([rounded_NK, (gate_NK - rounded_NK).to(out_RD.dtype)], 1)
        return F.embedding_bag(slot_NK, out_RD, per_sample_weights=parts_NK, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        out_RD, gate_NK = ctx.saved_tensors
        plan: RoutePlan = ctx.plan
        slot_R = plan.slot_NK.flatten()
        gate_R1 = gate_NK.new_empty(len(out_RD), 1)
        gate_R1[slot_R, 0] = gate_NK.flatten()
        grad_out_RD = torch.empty_like(out_RD)
        grad_gate_R = torch.empty(len(out_RD), dtype=widen(gate_NK).dtype, device=gate_NK.device)
        # Gradients of gates are sums over the width, so they are computed in float32.
        for block in _row_blocks(out_RD):
            grad = widen(grad_ND.index_select(0, plan.row_R[block]))
            torch.sum(widen(out_RD[block]) * grad, 1, out=grad_gate_R[block])
            grad_out_RD[block] = grad.mul_(gate_R1[block])
        return grad_out_RD, grad_gate_R[slot_R].view_as(gate_NK).to(gate_NK.dtype), None


combine: Callable[[Tensor, Tensor, RoutePlan], Tensor] = _Combine.apply
"""Function (out_RD, gate_NK, plan) -> y_ND, y_n = sum_k gate_nk * out[slot_nk], in the dtype of `out_RD`, added in
float32 or wider."""


def _row_blocks(x_RD: Tensor) -> Iterator[slice]:
    """Return slices that cover all rows: one on GPUs, small ones for the cache on CPUs."""
    # The caller reads and writes each row several times, so on a CPU its rows should stay in the cache.
    rows = max(1, CACHE_VALUES // x_RD.shape[1]) if x_RD.device.type == "cpu" else max(1, len(x_RD))
    return (slice(start, start + rows) for start in range(0, len(x_RD), rows))
