"""Checkpoint files for tests of the code that reads them."""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.checkpoint.format import local_slice
from mhmoe_ray.checkpoint.save import WriterAssignment, save_slices


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the slices of `tensors` that are assigned to this rank into one file in `folder`.

    All ranks have to call it, with the same tensors in the same order. A single process writes all tensors.
    """
    shares, rank = WriterAssignment(), dist.get_rank() if dist.is_initialized() else 0
    save_slices(folder, {name: local_slice(t) for name, t in tensors.items() if shares.is_writer(t)}, rank)
