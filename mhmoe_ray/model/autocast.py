"""Dtypes of matrix products: the one that autocast sets, and those that a run's spec can name."""

import torch
from torch import Tensor

from mhmoe_ray.spec.base import Precision

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Torch's dtypes by the names of precisions in a spec."""


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of products with x: autocast's if it is on, else that of x."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def cast_for_autocast(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Cast rows and weights to autocast's dtype if it is on."""
    # Autocast casts the operands of torch's own operations only. A feed-forward layer or an expert is one custom
    # operation, so its operands are cast here.
    if not torch.is_autocast_enabled(x.device.type):
        return x, *weights
    dtype = matmul_dtype(x)
    return tuple(t.to(dtype) for t in (x, *weights))
