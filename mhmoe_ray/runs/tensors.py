"""Named tensors to and from a checkpoint folder.

Each rank writes one file with slices of its own; a reader of any world size takes what it needs from all of them. No
rank waits for another, neither to write nor to read.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.model.held import is_shared_out
from mhmoe_ray.runs.manifest import removed
from mhmoe_ray.runs.slices import SUFFIX, Slice, StoredSlice, read_into, slice_of, stored_slices, write_slices
from mhmoe_ray.storage import FileEntry, Location, create_file

Index = Mapping[str, list[StoredSlice]]
"""All slices of a folder, by the names of their tensors."""


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


def load_tensors(
    folder: Location,
    into: Mapping[str, Tensor],
    on_slice: Callable[[], None] = lambda: None,
    index: Index | None = None,
) -> None:
    """Fill the given tensors (of DTensors this rank's parts) in place, each in its own dtype, from whatever slices the
    folder has. One file at a time is open, since each of many ranks may have written one.

    Args:
        folder: a part of a checkpoint.
        into: by name.
        on_slice: called after each.
        index: what `index_of` gives, for whoever has it.

    Raises:
        CheckpointError: a tensor is missing there, wholly or in part, or has another shape; or the checkpoint is
            removed meanwhile.
    """
    index = index_of(folder) if index is None else index
    targets = {name: slice_of(tensor) for name, tensor in into.items()}
    by_file: dict[Location, list[tuple[str, StoredSlice]]] = {}
    for name, target in targets.items():
        there = index.get(name, [])
        if not there:
            raise _unfit(folder, f"{name} is not in it")
        if (shape := _shape(there)) != (target.shape or (1,)):
            raise _unfit(folder, f"{name} has shape {shape} there and {target.shape} in the model")
        for stored in there:
            by_file.setdefault(stored.file, []).append((name, stored))
    filled = dict.fromkeys(targets, 0)
    for path, wanted in by_file.items():
        with _still_there(folder), path.open("rb", buffering=0) as file:
            for name, stored in wanted:
                filled[name] += read_into(targets[name], stored, file)
                on_slice()
    for name, target in targets.items():
        if filled[name] < target.local.numel():
            raise _unfit(folder, f"a part of {name} is not in it")


def index_of(folder: Location) -> Index:
    """What the headers of all files in the folder say.

    Raises:
        CheckpointError: a file is no safetensors file, or the checkpoint is removed meanwhile.
    """
    found: dict[str, list[StoredSlice]] = {}
    with _still_there(folder):
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


@contextmanager
def _still_there(folder: Location) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise removed(folder.parent) from e


def _unfit(folder: Location, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder.parent}", why, "use the model section it was written by")


def _shape(slices: list[StoredSlice]) -> tuple[int, ...]:
    """Of the whole that they are slices of."""
    ends = [[o + n for o, n in zip(s.offset, s.shape, strict=True)] for s in slices]
    return tuple(max(dim) for dim in zip(*ends, strict=True))
