"""Operators of the compiled C++ kernel of SwiGLU experts."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from mhmoe_kernels.cpp.build import library
from mhmoe_kernels.grouped.autograd import SortedKernel, empty_gradients
from mhmoe_kernels.operators import compiled_operator


@compiled_operator(fake=lambda x_RD, *_: (torch.empty_like(x_RD), []))
def _cpp_swiglu_forward(x_RD: Tensor, count_E: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the experts' outputs, and nothing that is kept; all tensors must be contiguous."""
    y_RD = torch.empty_like(x_RD)
    sizes = _sizes(weights[0])
    scratch = _scratch_memory(library().forward_bytes, *sizes[1:])
    library().forward(*_pointers(x_RD, *weights, y_RD, scratch, count_E), *sizes)
    return y_RD, []


@compiled_operator(fake=empty_gradients)
def _cpp_swiglu_backward(
    dy_RD: Tensor, count_E: Tensor, x_RD: Tensor, weights: list[Tensor], kept_tensors: list[Tensor]
) -> list[Tensor]:
    """Return the gradients of rows and weights, which must be contiguous; the hidden layer is computed again."""
    dy_RD = dy_RD.contiguous()
    gradients = [torch.empty_like(t) for t in (x_RD, *weights)]
    sizes = _sizes(weights[0])
    scratch = _scratch_memory(library().backward_bytes, *_pointers(count_E), *sizes)
    library().backward(*_pointers(x_RD, *weights, dy_RD, *gradients, scratch, count_E), *sizes)
    return gradients


CPP_SWIGLU = SortedKernel(_cpp_swiglu_forward, _cpp_swiglu_backward)
"""Experts that compute down(silu(gate(x)) * up(x)), on contiguous bfloat16 tensors with even D and F."""


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
