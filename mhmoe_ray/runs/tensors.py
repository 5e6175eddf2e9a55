"""Named tensors to and from a checkpoint folder, as safetensors through torch.distributed.checkpoint.

Each rank writes one file with its own slices; a reader of any world size assembles what it needs. Only tensors may be
given: torch's writer stores any other value as a pickle under a .safetensors name.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mhmoe_ray.errors import CheckpointError


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (DTensors by slices, plain ones once) of all ranks to a folder that does not exist yet.

    Collective: every rank of the default group calls it. Alone, a process needs no group.
    """
    _only_tensors(tensors)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone_is_fine():
        save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())


def load_tensors(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill the given tensors in place, each in its own dtype, from whatever slices the folder has.

    Raises:
        CheckpointError: a tensor is missing there or has another shape.
    """
    _only_tensors(into)
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    for name, tensor in into.items():
        there = stored.get(name)
        why = None
        if not isinstance(there, TensorStorageMetadata):
            why = f"{name} is not in it"
        elif there.size != tensor.shape:
            why = f"{name} has shape {tuple(there.size)} there and {tuple(tensor.shape)} in the model"
        if why:
            raise CheckpointError(f"checkpoint {folder.parent}", why, "use the model section it was written by")
    with _alone_is_fine():
        load(into, storage_reader=reader, no_dist=not dist.is_initialized())


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor of a folder, by name."""
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: there.properties.dtype for name, there in stored.items() if isinstance(there, TensorStorageMetadata)}


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns a process without a group that it works alone, which is what we asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _only_tensors(tensors: dict[str, Tensor]) -> None:
    assert all(isinstance(t, Tensor) for t in tensors.values())
