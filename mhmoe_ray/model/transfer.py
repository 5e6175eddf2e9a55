"""Copies of arrays to the device of a model."""

import numpy as np
import torch
from torch import Tensor


def copy_to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without waiting for work queued there."""
    # A copy to a GPU is asynchronous only from pinned memory.
    tensor = torch.from_numpy(array)
    return tensor.to(device) if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
