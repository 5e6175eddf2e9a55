"""Process groups of an acceptance test: of one rank in this process, or of several ranks in processes of their own."""

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mhmoe_ray.bench.acceptance.settings import Row, Settings
from mhmoe_ray.runs import jsonl

TIMEOUT = timedelta(seconds=120)
"""Time after which a collective fails, such as after another rank has died."""
_spawn: Callable[..., None] = spawn  # torch has no types for it


@contextmanager
def process_group(device: str, folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Context of the default process group, whose ranks meet by a file in `folder`."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cuda:nccl,cpu:gloo" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/store", timeout=TIMEOUT, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_ranks(settings: Settings, function: Callable[..., Iterator[Row]], *arguments: Any) -> list[Row]:
    """Run a function of `settings` on each of `settings.gpus` ranks, and return the rows of the first one.

    If a rank fails, all are ended and its error is raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        _spawn(_run_rank, (settings, Path(folder), function, arguments), nprocs=settings.gpus)
        return list(jsonl.read(Path(folder) / "rows.jsonl"))


def _run_rank(rank: int, settings: Settings, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    exit_with_parent()
    with process_group(settings.device, folder, rank, settings.gpus):
        for row in function(settings, *arguments):
            if rank == 0:
                jsonl.append(folder / "rows.jsonl", row)


def exit_with_parent() -> None:
    """End this process of `multiprocessing` when its parent ends, even if that is killed."""
    threading.Thread(target=_wait_and_exit, daemon=True).start()


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
