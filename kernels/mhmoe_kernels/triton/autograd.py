"""Autograd function from routed rows to combined outputs, which keeps x, routes and weights for the backward.

The backward recomputes the hidden layer and the values for the gradients of the gates. For LayerNorm, the mean and the
deviation are kept, two numbers per route.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.triton.combine import combine
from mhmoe_kernels.triton.launch import ExpertKernels
from mhmoe_kernels.triton.schedule import Routes


def fused_experts(
    kernels: ExpertKernels, x_ND: Tensor, gate_NK: Tensor, weights: tuple[Tensor, ...], routes: Routes
) -> Tensor:
    """Return y_ND, the sum of the outputs of each row's experts, weighted by `gate_NK`."""
    return _fused_experts(kernels, routes, x_ND, gate_NK, *weights)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: ExpertKernels, routes: Routes, x_ND: Tensor, gate_NK: Tensor, *weights: Tensor
    ) -> Tensor:
        x_ND, gate_NK = x_ND.contiguous(), gate_NK.contiguous()
        weights = tuple(w.contiguous() for w in weights)
        out_RD, saved = kernels.forward(x_ND, weights, routes)
        ctx.kernels, ctx.n_weights = kernels, len(weights)
        ctx.save_for_backward(*routes, x_ND, gate_NK, *weights, *saved)
        return combine(out_RD, routes.slot_NK, gate_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        row_R, slot_NK, offset_E1, x_ND, gate_NK, *weights_and_saved = ctx.saved_tensors
        weights, saved = tuple(weights_and_saved[: ctx.n_weights]), tuple(weights_and_saved[ctx.n_weights :])
        routes, kernels, dy_ND = Routes(row_R, slot_NK, offset_E1), ctx.kernels, dy_ND.contiguous()
        # The kernels walk over sorted routes, so the gates are sorted, too.
        scale_R = torch.empty_like(gate_NK.flatten())
        scale_R[slot_NK.flatten()] = gate_NK.flatten()
        # The kernel for weights reads results of the kernel for rows. So the kernel for rows runs whichever gradients
        # are needed.
        dx_RD, dscale_R, row_results = kernels.backward_rows(x_ND, dy_ND, scale_R, weights, saved, routes)
        dx_ND = combine(dx_RD, slot_NK, None) if ctx.needs_input_grad[2] else None
        dgate_NK = dscale_R[slot_NK].to(gate_NK.dtype)
        dweights: tuple[Tensor | None, ...] = (None,) * len(weights)
        if any(ctx.needs_input_grad[4:]):
            dweights = kernels.backward_weights(x_ND, dy_ND, scale_R, weights, row_results, routes)
        return None, None, dx_ND, dgate_NK, *dweights


_fused_experts: Callable[..., Tensor] = _FusedExperts.apply
