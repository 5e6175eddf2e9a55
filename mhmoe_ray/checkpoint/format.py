"""Slices of tensors in safetensors files: read any part of a slice, and write slices without a second copy in memory.

The layout is that of `torch.distributed.checkpoint.hf_storage`: the metadata of a file holds the offset of each slice
in its full tensor. So torch reads the files of this module, and this module reads the files of torch. A file without
this metadata holds full tensors.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from mhmoe_ray.model.held import local_shard, shard_offset
from mhmoe_ray.parsing import parse_object
from mhmoe_ray.storage import FileEntry, Location

SUFFIX = ".safetensors"
# Files are written and slices are converted in pieces of this size, so that little additional memory is needed.
PIECE_BYTES = 16 << 20
_OFFSETS_KEY, _VERSION_KEY = "DCP_SHARDING_INFO", "DCP_VERSION"
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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Slice(NamedTuple):
    """Slice of a tensor that this process holds in memory."""

    local: Tensor
    offset: tuple[int, ...]
    """Index of the slice's first element in the full tensor."""
    shape: tuple[int, ...]
    """Shape of the full tensor."""


def local_slice(tensor: Tensor) -> Slice:
    """Return this rank's slice of a tensor, as a view: the local shard of a DTensor, or the whole of a plain tensor."""
    return Slice(local_shard(tensor).detach(), shard_offset(tensor), tuple(tensor.shape))


def write_slices(file: BinaryIO, slices: Mapping[str, Slice], on_piece: Callable[[], None] = lambda: None) -> FileEntry:
    """Write slices in CPU memory, by tensor name, as a complete safetensors file; return its size and hash.

    `on_piece` is called after each piece of at most `PIECE_BYTES` of data.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            _OFFSETS_KEY: json.dumps({name: {"saved_offsets": list(s.offset)} for name, s in slices.items()}),
            _VERSION_KEY: "1.0",
        }
    }
    end = 0
    for name, s in slices.items():
        start, end = end, end + s.local.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[s.local.dtype],
            "shape": list(s.local.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    # Data begins at a multiple of 8 bytes, as safetensors' own writer aligns it.
    text += b" " * (-len(text) % 8)
    # The hash is computed while writing, so that the file need not be read again.
    digest, size = hashlib.sha256(), 0
    for piece in _pieces([len(text).to_bytes(8, "little") + text], (s.local for s in slices.values())):
        file.write(piece)
        digest.update(piece)
        size += len(piece)
        on_piece()
    return FileEntry(size=size, sha256=digest.hexdigest())


def _pieces(header_pieces: Iterable[bytes], tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield from header_pieces
    for tensor in tensors:
        data = _tensor_bytes(tensor.contiguous())
        yield from (data[i : i + PIECE_BYTES] for i in range(0, len(data), PIECE_BYTES))


def _tensor_bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


class StoredSlice(NamedTuple):
    """Slice of a tensor in a safetensors file, which is not read yet."""

    file: Location
    start: int
    """Position of the slice's first byte in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of the slice; (1,) for a scalar."""
    offset: tuple[int, ...]
    """Index of the slice's first element in the full tensor."""


def stored_slices(file: Location) -> dict[str, StoredSlice]:
    """Return the slices in a safetensors file by tensor name, from its header; ValueError for another file or dtype."""
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        # A safetensors file begins with the length of its header in 8 bytes. In a file of another format these may give
        # a huge number, and reading so many bytes would fail.
        if length > file.stat().st_size:
            raise ValueError("it is no safetensors file")
        header = parse_object(f.read(length))
    try:
        return dict(_slices(file, header, 8 + length))
    except (LookupError, TypeError, AttributeError) as e:
        raise ValueError("its header is damaged") from e


def _slices(file: Location, header: dict[str, Any], data_start: int) -> Iterator[tuple[str, StoredSlice]]:
    offsets = parse_object(header.pop("__metadata__", {}).get(_OFFSETS_KEY, "{}"))
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of dtype {entry['dtype']}")
        shape = tuple(entry["shape"]) or (1,)
        offset = tuple(offsets[name]["saved_offsets"] if name in offsets else ()) or (0,) * len(shape)
        yield name, StoredSlice(file, data_start + entry["data_offsets"][0], DTYPES[entry["dtype"]], shape, offset)


class Readable(Protocol):
    """Binary file that is open for reading."""

    def seek(self, offset: int, /) -> int: ...

    def readinto(self, buffer: memoryview, /) -> int | None: ...


def read_into(target: Slice, stored: StoredSlice, file: Readable) -> int:
    """Copy the overlap of a stored slice and a slice in memory from the open file; return its number of elements.

    `file` is `stored.file`. Values are converted to the dtype in memory. A file that ends too early is a ValueError.
    """
    local = target.local if target.local.ndim else target.local.view(1)
    shape, stored_offset, target_offset = stored.shape, stored.offset, target.offset or (0,)
    overlap_start = [max(a, b) for a, b in zip(target_offset, stored_offset, strict=True)]
    overlap_end = [
        min(a + n, b + m) for a, n, b, m in zip(target_offset, local.shape, stored_offset, shape, strict=True)
    ]
    if any(b <= a for a, b in zip(overlap_start, overlap_end, strict=True)):
        return 0
    overlap = local[
        tuple(slice(a - o, b - o) for a, b, o in zip(overlap_start, overlap_end, target_offset, strict=True))
    ]
    inner_slices = tuple(
        slice(a - o, b - o) for a, b, o in zip(overlap_start[1:], overlap_end[1:], stored_offset[1:], strict=True)
    )
    row_bytes = math.prod(shape[1:]) * stored.dtype.itemsize
    block_rows = max(1, PIECE_BYTES // max(1, row_bytes))
    # If dtype, device and row shape match, bytes are read into the target itself, otherwise through a buffer.
    is_direct = overlap.dtype == stored.dtype and overlap.device.type == "cpu" and overlap[0].shape == shape[1:]
    for i in range(0, len(overlap), block_rows):
        part = overlap[i : i + block_rows]
        buffer = part
        if not (is_direct and part.is_contiguous()):
            buffer = torch.empty(len(part), *shape[1:], dtype=stored.dtype)
        file.seek(stored.start + (overlap_start[0] - stored_offset[0] + i) * row_bytes)
        _read_fully(file, _tensor_bytes(buffer))
        if buffer is not part:
            part.copy_(buffer[:, *inner_slices])
    return overlap.numel()


def _read_fully(file: Readable, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise ValueError("it ends too early")
        buffer = buffer[count:]


SliceIndex = Mapping[str, list[StoredSlice]]
"""Slices in all safetensors files of a folder, by the names of their tensors."""


def file_name(rank: int) -> str:
    """Return the name of a rank's file in the folders `weights` and `optim` of a checkpoint."""
    return f"rank_{rank:05d}{SUFFIX}"


def full_shape(slices: list[StoredSlice]) -> tuple[int, ...]:
    """Return the shape of a full tensor, computed from all its stored slices."""
    slice_ends = [[o + n for o, n in zip(s.offset, s.shape, strict=True)] for s in slices]
    return tuple(max(dim) for dim in zip(*slice_ends, strict=True))
