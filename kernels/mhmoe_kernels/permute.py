"""Sorting routes by expert and bringing them back. Both directions gather, forward and backward: no scatter-add."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RoutePlan(NamedTuple):
    """Where each of the R = N * K routes goes when routes are sorted by expert (stable: rows stay in order)."""

    row_R: Tensor
    """For each sorted route, the row it came from."""
    slot_NK: Tensor
    """For each route of a row, its place in the sorted order."""
    count_E: Tensor
    """Routes per expert."""


def plan_routes(expert_NK: Tensor, n_experts: int) -> RoutePlan:
    """Sort the routes of `expert_NK` (int64, values below n_experts) by expert."""
    flat_R = expert_NK.flatten()
    order_R = torch.argsort(flat_R, stable=True)
    slot_R = torch.empty_like(order_R)
    slot_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    # Not bincount, which makes the host wait for a GPU.
    past_E = torch.searchsorted(flat_R[order_R], torch.arange(n_experts, device=flat_R.device), right=True)
    count_E = past_E.diff(prepend=past_E.new_zeros(1))
    return RoutePlan(order_R // expert_NK.shape[1], slot_R.view_as(expert_NK), count_E)


def permute(x_ND: Tensor, plan: RoutePlan) -> Tensor:
    """x_RD: row n appears once per route, sorted by expert."""
    result: Tensor = _Permute.apply(x_ND, plan)  # type: ignore[no-untyped-call]
    return result


def combine(out_RD: Tensor, gate_NK: Tensor, plan: RoutePlan) -> Tensor:
    """y_n = sum_k gate_nk * out[slot_nk], added in float32 or wider, returned in the dtype of `out_RD`."""
    result: Tensor = _Combine.apply(out_RD, gate_NK, plan)  # type: ignore[no-untyped-call]
    return result


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, plan: RoutePlan) -> Tensor:
        ctx.slot_NK = plan.slot_NK
        return x_ND[plan.row_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return grad_RD[ctx.slot_NK].sum(1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, gate_NK: Tensor, plan: RoutePlan) -> Tensor:
        ctx.save_for_backward(out_RD, gate_NK)
        ctx.plan = plan
        return torch.einsum("nkd,nk->nd", _wide(out_RD)[plan.slot_NK], _wide(gate_NK)).to(out_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        out_RD, gate_NK = ctx.saved_tensors
        plan: RoutePlan = ctx.plan
        gate_R = torch.empty_like(gate_NK.flatten())
        gate_R[plan.slot_NK.flatten()] = gate_NK.flatten()
        grad_out_RD = (grad_ND[plan.row_R] * gate_R[:, None]).to(out_RD.dtype)
        grad_gate_NK = torch.einsum("nkd,nd->nk", _wide(out_RD)[plan.slot_NK], _wide(grad_ND)).to(gate_NK.dtype)
        return grad_out_RD, grad_gate_NK, None


def _wide(x: Tensor) -> Tensor:
    """At least float32, since sums over experts in bfloat16 lose what routing learns from."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
