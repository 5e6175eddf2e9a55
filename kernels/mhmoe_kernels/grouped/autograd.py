"""Autograd function of experts on sorted rows, for kernels with a forward and a backward written by hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SortedKernel(NamedTuple):
    """Forward and backward of one kind of experts, on rows that are sorted by expert."""

    forward: Callable[..., tuple[Tensor, list[Tensor]]]
    """Function (x_RD, count_E, *options, weights) -> (out_RD, tensors that the backward also needs)."""
    backward: Callable[..., list[Tensor]]
    """Function (dout_RD, count_E, *options, x_RD, weights, those tensors) -> gradients of the rows and each weight."""

    def __call__(
        self, x_RD: Tensor, count_E: Tensor, options: tuple[float, ...], weights: tuple[Tensor, ...]
    ) -> Tensor:
        """Return the experts' outputs, with gradients; `count_E` is int64 in CPU memory."""
        return _sorted_experts(self, count_E, options, x_RD, *weights)


def empty_gradients(*arguments: Any) -> list[Tensor]:
    """Return uninitialized results of `SortedKernel.backward` for its arguments."""
    x_RD, weights, _ = arguments[-3:]
    return [torch.empty_like(t) for t in (x_RD, *weights)]


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: SortedKernel, count_E: Tensor, options: tuple[float, ...], x_RD: Tensor, *weights: Tensor
    ) -> Tensor:
        out_RD, kept_tensors = kernel.forward(x_RD, count_E, *options, list(weights))
        ctx.kernel, ctx.count_E, ctx.options, ctx.weight_count = kernel, count_E, options, len(weights)
        ctx.save_for_backward(x_RD, *weights, *kept_tensors)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, *saved = ctx.saved_tensors
        weights, kept_tensors = saved[: ctx.weight_count], saved[ctx.weight_count :]
        gradients = ctx.kernel.backward(dout_RD, ctx.count_E, *ctx.options, x_RD, weights, kept_tensors)
        return None, None, None, *gradients


_sorted_experts: Callable[..., Tensor] = _SortedExperts.apply
