"""Experts between routed rows and combined output, as an autograd function that keeps x, routes and weights for the
backward.

The hidden layer is recomputed, and so is what the gradients of the gates need. LayerNorm's mean and deviation, two
numbers per route, are kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.triton.combine import combine
from mhmoe_kernels.triton.launch import Kind
from mhmoe_kernels.triton.schedule import Routes


def fused_experts(kind: Kind, x_ND: Tensor, gate_NK: Tensor, weights: tuple[Tensor, ...], routes: Routes) -> Tensor:
    """Return y_ND: the outputs of each row's experts, weighted by `gate_NK` and added."""
    return _fused_experts(kind, routes, x_ND, gate_NK, *weights)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Kind, routes: Routes, x_ND: Tensor, gate_NK: Tensor, *weights: Tensor) -> Tensor:
        x_ND, gate_NK = x_ND.contiguous(), gate_NK.contiguous()
        weights = tuple(w.contiguous() for w in weights)
        out_RD, kept = kind.forward(x_ND, weights, routes)
        ctx.kind, ctx.n_weights = kind, len(weights)
        ctx.save_for_backward(*routes, x_ND, gate_NK, *weights, *kept)
        return combine(out_RD, routes.slot_NK, gate_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        row_R, slot_NK, first_E1, x_ND, gate_NK, *rest = ctx.saved_tensors
        weights, kept = tuple(rest[: ctx.n_weights]), tuple(rest[ctx.n_weights :])
        routes, kind, dy_ND = Routes(row_R, slot_NK, first_E1), ctx.kind, dy_ND.contiguous()
        scale_R = torch.empty_like(gate_NK.flatten())
        scale_R[slot_NK.flatten()] = gate_NK.flatten()
        # Weights need what the rows' kernel finds, so it runs whichever gradients are asked for.
        dx_RD, dscale_R, found = kind.backward_rows(x_ND, dy_ND, scale_R, weights, kept, routes)
        dx_ND = combine(dx_RD, slot_NK, None) if ctx.needs_input_grad[2] else None
        dgate_NK = dscale_R[slot_NK].to(gate_NK.dtype)
        dweights: tuple[Tensor | None, ...] = (None,) * len(weights)
        if any(ctx.needs_input_grad[4:]):
            dweights = kind.backward_weights(x_ND, dy_ND, scale_R, weights, found, routes)
        return None, None, dx_ND, dgate_NK, *dweights


_fused_experts: Callable[..., Tensor] = _FusedExperts.apply
