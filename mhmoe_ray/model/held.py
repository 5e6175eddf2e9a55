"""What this process holds of a tensor that may be shared out over ranks."""

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shared_out(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor. Where nobody has imported their module there are none, and it is not imported to find
    out: that takes half a second, which a server's process need not wait for."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the whole of any other tensor; a view."""
    return tensor.to_local() if is_shared_out(tensor) else tensor


def offset(tensor: Tensor) -> tuple[int, ...]:
    """Where that begins in the whole."""
    if not is_shared_out(tensor):
        return (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(first)
