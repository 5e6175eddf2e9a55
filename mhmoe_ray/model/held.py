"""What this process holds of a tensor that may be shared out over ranks."""

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the whole of any other tensor; a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def offset(tensor: Tensor) -> tuple[int, ...]:
    """Where that begins in the whole."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    _, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(first)
