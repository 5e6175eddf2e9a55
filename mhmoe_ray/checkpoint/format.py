"""Slices of tensors in safetensors files, read at any offset and written without a second copy in memory.

The layout is torch's own (`torch.distributed.checkpoint.hf_storage`): the file's metadata says where a slice begins in
its whole tensor, so torch's reader reads our files and this module reads torch's. Files without it hold whole tensors.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from mhmoe_ray.model.held import local, offset
from mhmoe_ray.storage import FileEntry, Location

SUFFIX = ".safetensors"
PIECE = 16 << 20  # bytes in memory at a time
_OFFSETS, _VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Slice(NamedTuple):
    """Slice of a tensor that a process holds."""

    local: Tensor
    offset: tuple[int, ...]
    """Start of the slice in the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""


def slice_of(tensor: Tensor) -> Slice:
    """Return a view of this rank's part of a DTensor, or of the whole of any other tensor."""
    return Slice(local(tensor).detach(), offset(tensor), tuple(tensor.shape))


def write_slices(file: BinaryIO, slices: Mapping[str, Slice], on_piece: Callable[[], None] = lambda: None) -> FileEntry:
    """Write a complete safetensors file of tensors in CPU memory; return its size and hash, computed while writing.

    Args:
        file: file that is open for writing.
        slices: slices by the names of their tensors.
        on_piece: called after each piece that is written.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            _OFFSETS: json.dumps({name: {"saved_offsets": list(s.offset)} for name, s in slices.items()}),
            _VERSION: "1.0",
        }
    }
    end = 0
    for name, s in slices.items():
        start, end = end, end + s.local.nbytes
        header[name] = {"dtype": _NAMES[s.local.dtype], "shape": list(s.local.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    for piece in _pieces([len(text).to_bytes(8, "little") + text], (s.local for s in slices.values())):
        file.write(piece)
        digest.update(piece)
        size += len(piece)
        on_piece()
    return FileEntry(size=size, sha256=digest.hexdigest())


def _pieces(first: Iterable[bytes], tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield from first
    for tensor in tensors:
        whole = _bytes_of(tensor.contiguous())
        yield from (whole[i : i + PIECE] for i in range(0, len(whole), PIECE))


def _bytes_of(contiguous: Tensor) -> memoryview:
    return contiguous.view(-1).view(torch.uint8).numpy().data


class StoredSlice(NamedTuple):
    """Slice of a tensor as it is stored in a file."""

    file: Location
    start: int
    """Position of the slice's first byte in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of the slice; (1,) for a number without a dimension."""
    offset: tuple[int, ...]


def stored_slices(file: Location) -> dict[str, StoredSlice]:
    """Return all slices of a file, by the names of their tensors.

    Raises:
        ValueError: the file is not a safetensors file, or holds a dtype that no model has.
    """
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("it is no safetensors file")
        header = json.loads(f.read(length))
    offsets = json.loads(header.pop("__metadata__", {}).get(_OFFSETS, "{}"))
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of dtype {entry['dtype']}")
        shape = tuple(entry["shape"]) or (1,)
        offset = tuple(offsets[name]["saved_offsets"] if name in offsets else ()) or (0,) * len(shape)
        start = 8 + length + entry["data_offsets"][0]
        found[name] = StoredSlice(file, start, DTYPES[entry["dtype"]], shape, offset)
    return found


class Readable(Protocol):
    """Binary file that is open for reading."""

    def seek(self, offset: int, /) -> int: ...

    def readinto(self, into: memoryview, /) -> int | None: ...


def read_into(target: Slice, stored: StoredSlice, file: Readable) -> int:
    """Copy the values that a stored slice and a target have in common, in the target's dtype; return their number.

    Args:
        target: slice to fill.
        stored: stored slice of the same tensor.
        file: the file `stored.file`, open for reading.

    Raises:
        ValueError: the file ends too early.
    """
    local = target.local if target.local.ndim else target.local.view(1)
    shape, there, here = stored.shape, stored.offset, target.offset or (0,)
    first = [max(a, b) for a, b in zip(here, there, strict=True)]
    last = [min(a + n, b + m) for a, n, b, m in zip(here, local.shape, there, shape, strict=True)]
    if any(b <= a for a, b in zip(first, last, strict=True)):
        return 0
    wanted = local[tuple(slice(a - o, b - o) for a, b, o in zip(first, last, here, strict=True))]
    inner = tuple(slice(a - o, b - o) for a, b, o in zip(first[1:], last[1:], there[1:], strict=True))
    row = math.prod(shape[1:]) * stored.dtype.itemsize
    rows = max(1, PIECE // max(1, row))
    direct = wanted.dtype == stored.dtype and wanted.device.type == "cpu" and wanted[0].shape == shape[1:]
    for i in range(0, len(wanted), rows):
        part = wanted[i : i + rows]
        into = part
        if not (direct and part.is_contiguous()):
            into = torch.empty(len(part), *shape[1:], dtype=stored.dtype)
        file.seek(stored.start + (first[0] - there[0] + i) * row)
        _fill(file, _bytes_of(into))
        if into is not part:
            part.copy_(into[:, *inner])
    return wanted.numel()


def _fill(file: Readable, into: memoryview) -> None:
    while into:
        count = file.readinto(into)
        if not count:
            raise ValueError("it ends too early")
        into = into[count:]


Index = Mapping[str, list[StoredSlice]]
"""All slices of a folder, by the names of their tensors."""


def file_name(rank: int) -> str:
    """Return the name of a rank's file in each folder of a checkpoint."""
    return f"rank_{rank:05d}{SUFFIX}"


def _shape(slices: list[StoredSlice]) -> tuple[int, ...]:
    """Return the shape of the whole tensor that these slices are parts of."""
    ends = [[o + n for o, n in zip(s.offset, s.shape, strict=True)] for s in slices]
    return tuple(max(dim) for dim in zip(*ends, strict=True))
