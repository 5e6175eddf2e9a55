"""Run a function in several processes that form a gloo group, to test distributed code on any CPU."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mhmoe_ray.cluster.spawn import free_ports
from tests.support.forked import FORKED, replace_environment


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on each of `world` ranks, and return the results in the order of ranks.

    The ranks are processes of torch's default process group; a single rank has no group. If a rank fails, all are ended
    and its error is raised here. Function, arguments and results have to be picklable.
    """
    with tempfile.TemporaryDirectory() as folder:
        rank_arguments = (dict(os.environ), world, free_ports(1)[0], folder, function, args)
        mp.start_processes(_rank, rank_arguments, nprocs=world, start_method=FORKED.get_start_method())
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(
    rank: int,
    environment: dict[str, str],
    world: int,
    port: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Run the function as one rank, and write its result to `folder`."""
    torch.set_num_threads(1)
    replace_environment(environment)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    if world > 1:
        dist.init_process_group("gloo")
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
