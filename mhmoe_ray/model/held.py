"""Access to the shard that this process holds of a tensor, which may be sharded over ranks (DTensor)."""

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor, without importing torch's module of them."""
    # Importing the module takes half a second, which would delay the start of a server. If nobody has imported it,
    # there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor as a view, any other tensor unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard_offset(tensor: Tensor) -> tuple[int, ...]:
    """Return the offset of `local_shard(tensor)` in the full tensor."""
    if not is_dtensor(tensor):
        return (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset)
