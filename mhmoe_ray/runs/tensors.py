"""Named tensors to and from a checkpoint folder.

Each rank writes one file with slices of its own; a reader of any world size takes what it needs from all of them. No
rank waits for another, neither to write nor to read.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.location import Location
from mhmoe_ray.model.held import is_shared_out
from mhmoe_ray.runs.files import create_file
from mhmoe_ray.runs.manifest import FileEntry
from mhmoe_ray.runs.slices import SUFFIX, Slice, StoredSlice, read_into, slice_of, stored_slices, write_slices


class Shares:
    """Which of the ranks that hold the same writes it: the one that has least to write so far.

    Every rank finds the same answer by itself, if all ask for the same tensors in the same order.
    """

    def __init__(self) -> None:
        world, self._rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self._load = [0] * world

    def is_mine(self, tensor: Tensor) -> bool:
        """Whether this rank writes its part of a DTensor, or the whole of any other tensor."""
        ours = [self._writer(holders, tensor.numel()) for holders in self._holders(tensor)]
        return self._rank in ours

    def _writer(self, holders: list[int], size: int) -> int:
        least = min(holders, key=self._load.__getitem__)
        self._load[least] += size
        return least

    def _holders(self, tensor: Tensor) -> list[list[int]]:
        """For each of its slices, the ranks that hold it."""
        if not is_shared_out(tensor):
            return [list(range(len(self._load)))]
        from torch.distributed.tensor import Replicate

        mesh = tensor.device_mesh.mesh
        alike = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
        apart = [dim for dim in range(mesh.ndim) if dim not in alike]
        slices = mesh.permute(*apart, *alike).reshape(-1, *(mesh.shape[dim] for dim in alike))
        return [holders.flatten().tolist() for holders in slices]


def save_slices(
    folder: Location, slices: Mapping[str, Slice], rank: int, on_piece: Callable[[], None] = lambda: None
) -> FileEntry:
    """Write slices, which are in CPU memory, as one file; one without any has no bytes of data.

    Args:
        folder: a part of a checkpoint.
        slices: by the names of their tensors.
        rank: that writes them.
        on_piece: called now and then, as long as it gets on.

    Raises:
        OSError: the file is there already, or cannot be written.
    """
    with create_file(folder / file_name(rank)) as file:
        return write_slices(file, slices, on_piece)


def file_name(rank: int) -> str:
    """Of a rank's file in each folder of a checkpoint."""
    return f"rank_{rank:05d}{SUFFIX}"


def load_tensors(folder: Location, into: Mapping[str, Tensor], on_tensor: Callable[[], None] = lambda: None) -> None:
    """Fill the given tensors (of DTensors this rank's parts) in place, each in its own dtype, from whatever slices the
    folder has.

    Args:
        folder: a part of a checkpoint.
        into: by name.
        on_tensor: called after each.

    Raises:
        CheckpointError: a tensor is missing there, wholly or in part, or has another shape.
    """
    stored = _stored(folder)
    every = {s.file for slices in stored.values() for s in slices}
    with ExitStack() as stack:
        files = {file: stack.enter_context(file.open("rb", buffering=0)) for file in every}
        for name, tensor in into.items():
            target, there = slice_of(tensor), stored.get(name, [])
            shape = _shape(there)
            why = None
            if not there:
                why = f"{name} is not in it"
            elif shape != target.shape:
                why = f"{name} has shape {shape} there and {target.shape} in the model"
            elif sum(read_into(target, s, files[s.file]) for s in there) < target.local.numel():
                why = f"a part of {name} is not in it"
            if why:
                raise CheckpointError(f"checkpoint {folder.parent}", why, "use the model section it was written by")
            on_tensor()


def stored_dtypes(folder: Location) -> dict[str, torch.dtype]:
    """The dtype of each tensor of a folder, by name."""
    return {name: slices[0].dtype for name, slices in _stored(folder).items()}


def _stored(folder: Location) -> dict[str, list[StoredSlice]]:
    """All slices in the folder's files, by the names of their tensors.

    Raises:
        CheckpointError: a file is no safetensors file.
    """
    found: dict[str, list[StoredSlice]] = {}
    files: list[Location] = list(folder.glob(f"*{SUFFIX}"))
    for file in sorted(files, key=lambda file: file.name):
        try:
            slices = stored_slices(file)
        except (ValueError, KeyError) as e:
            why = f"{file.name} cannot be read ({e})"
            raise CheckpointError(f"checkpoint {folder.parent}", why, "use another checkpoint of the run") from e
        for name, stored in slices.items():
            found.setdefault(name, []).append(stored)
    return found


def _shape(slices: list[StoredSlice]) -> tuple[int, ...]:
    """Of the whole that they are slices of."""
    ends = [[o + n for o, n in zip(s.offset, s.shape, strict=True)] for s in slices]
    return tuple(max(dim) for dim in zip(*ends, strict=True))
