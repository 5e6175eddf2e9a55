"""The dtype of matrix products, with autocast or by the name of a precision."""

import torch
from torch import Tensor

from mhmoe_ray.spec.base import Precision

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes by the names of precisions in a spec."""


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x, which is autocast's if autocast is on."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def cast_for_autocast(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Return rows and weights in autocast's dtype if autocast is on, and unchanged otherwise."""
    # Autocast casts the operands of torch's own operations, but a feed-forward layer or an expert is one operation.
    if not torch.is_autocast_enabled(x.device.type):
        return x, *weights
    dtype = matmul_dtype(x)
    return tuple(t.to(dtype) for t in (x, *weights))
