"""The compiled C++ kernel of SwiGLU experts as an autograd function of torch."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_kernels.cpp.build import library
from mhmoe_kernels.operators import compiled_operator


def swiglu_sorted(x_RD: Tensor, count_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """Return down(silu(gate(x)) * up(x)) for rows that are sorted by expert.

    Rows and weights must be bfloat16, D and F even, and `count_E` int64.
    """
    return _swiglu(x_RD, count_E, gate_EFD, up_EFD, down_EDF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, count_E: Tensor, *stacked: Tensor) -> Tensor:
        x_RD, *weights = (t.contiguous() for t in (x_RD, *stacked))
        # The backward computes the hidden layer again, so only inputs are kept.
        ctx.save_for_backward(x_RD, *weights)
        ctx.count_E = count_E
        y_RD: Tensor = _cpp_swiglu_forward(x_RD, count_E, weights)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, *weights = ctx.saved_tensors
        dx_RD, *gradients = _cpp_swiglu_backward(dy_RD.contiguous(), ctx.count_E, x_RD, weights)
        return dx_RD, None, *gradients


_swiglu: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = _SwiGLU.apply


@compiled_operator(fake=lambda x_RD, *_: torch.empty_like(x_RD))
def _cpp_swiglu_forward(x_RD: Tensor, count_E: Tensor, weights: list[Tensor]) -> Tensor:
    """Return the experts' outputs; all tensors must be contiguous."""
    y_RD = torch.empty_like(x_RD)
    sizes = _sizes(weights[0])
    scratch = _scratch_memory(library().forward_bytes, *sizes[1:])
    library().forward(*_pointers(x_RD, *weights, y_RD, scratch, count_E), *sizes)
    return y_RD


@compiled_operator(fake=lambda dy_RD, count_E, x_RD, weights: [*map(torch.empty_like, (x_RD, *weights))])
def _cpp_swiglu_backward(dy_RD: Tensor, count_E: Tensor, x_RD: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Return the gradients of rows and weights; all tensors must be contiguous."""
    gradients = [torch.empty_like(t) for t in (x_RD, *weights)]
    sizes = _sizes(weights[0])
    scratch = _scratch_memory(library().backward_bytes, *_pointers(count_E), *sizes)
    library().backward(*_pointers(x_RD, *weights, dy_RD, *gradients, scratch, count_E), *sizes)
    return gradients


def _sizes(gate_EFD: Tensor) -> tuple[Any, ...]:
    E, F, D = gate_EFD.shape
    return *(ctypes.c_int64(n) for n in (E, D, F)), ctypes.c_int(torch.get_num_threads())


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def _scratch_memory(size_function: Any, *arguments: Any) -> Tensor:
    """Return memory of `size_function(*arguments)` bytes from torch's allocator, which counts it."""
    # ctypes truncates results to 32 bits unless it is told their type.
    size_function.restype = ctypes.c_int64
    return torch.empty(size_function(*arguments), dtype=torch.uint8)
