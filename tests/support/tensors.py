"""Default types of tensors, and a count of the tensors that autograd saves."""

from contextlib import contextmanager

import torch


@contextmanager
def default_dtype(dtype):
    """Context in which new tensors have `dtype`."""
    previous_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous_dtype)


class SavedTensors:
    """Hook for tensors that autograd saves, which adds up the bytes of their storages, except those of weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        # Fake tensors have storages, too, but no addresses of data.
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._saved_tensors: dict[int, torch.Tensor] = {}  # tensors are kept, so that no two share a storage's address

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        address = t.untyped_storage()._cdata
        if address not in self._weights:
            self._saved_tensors[address] = t
        return t

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._saved_tensors.values())
