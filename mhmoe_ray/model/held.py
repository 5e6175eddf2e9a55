"""The part of a tensor that this process holds, if the tensor is sharded over ranks."""

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shared_out(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor.

    If the DTensor module has not been imported, there are none. It is not imported to find out, because that takes half
    a second, which would delay a server's process.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or any other tensor whole; the result is a view."""
    return tensor.to_local() if is_shared_out(tensor) else tensor


def offset(tensor: Tensor) -> tuple[int, ...]:
    """Return the offset of `local(tensor)` in the whole tensor, one index per dimension."""
    if not is_shared_out(tensor):
        return (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(first)
