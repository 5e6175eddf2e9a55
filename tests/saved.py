"""Checkpoints that are written at once, for tests of the code that reads them."""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.checkpoint.format import slice_of
from mhmoe_ray.checkpoint.save import Shares, save_slices


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's share of the tensors as a file of its own."""
    shares, rank = Shares(), dist.get_rank() if dist.is_initialized() else 0
    save_slices(folder, {name: slice_of(t) for name, t in tensors.items() if shares.is_mine(t)}, rank)
