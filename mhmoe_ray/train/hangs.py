"""Diagnosis of a hang: which collective each rank waits in, for whom, and where the Python threads of its process are.

torch's flight recorder counts the collectives of each process group alike on all its ranks. A rank that has not issued
the collective in which another rank waits is the one that keeps it waiting.

The stacks are written by faulthandler's signal handler. It needs no Python lock, so it also works in a process whose
threads are blocked by C code, and where no thread of ours can run. Another process sends the signal and reads the file.
"""

import faulthandler
import json
import os
import re
import signal
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

STACK_SIGNAL = signal.SIGUSR1
_STACK_FILE = "mhmoe-stacks"
# Seconds for a process to write its stacks, and between two looks at its file; it is complete once it stops growing.
_WRITE_SECONDS, _POLL_SECONDS = 1.0, 0.05


class GroupState(NamedTuple):
    """Collectives of this rank in one process group, by their sequence numbers."""

    ranks: tuple[int, ...]
    issued: int  # newest that this rank has issued
    pending: tuple[int, str] | None  # oldest that is not complete, with its name


def collectives() -> dict[str, GroupState]:
    """Return the collectives of this process by the name of their process group."""
    # Only workers import torch, while the watchdog imports this module, too.
    import torch.distributed as dist
    from torch._C import _distributed_c10d as c10d

    if not dist.is_initialized():
        return {}
    world = dist.distributed_c10d._world
    ranks_of = {name: tuple(world.pg_group_ranks[group]) for group, name in world.pg_names.items()}
    # NCCL has a recorder of its own, which builds of torch without CUDA lack.
    dumps = [getattr(c10d, name, None) for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json")]
    states: dict[str, GroupState] = {}
    for entry in [entry for dump in dumps if dump for entry in json.loads(dump()).get("entries", [])]:
        name, number = entry["process_group"][0], entry["collective_seq_id"]
        if name not in ranks_of or entry["is_p2p"]:
            continue
        state = states.get(name, GroupState(ranks_of[name], 0, None))
        is_pending = not entry["retired"] and entry["state"] != "completed"
        pending = state.pending or ((number, entry["profiling_name"].partition(":")[2]) if is_pending else None)
        states[name] = GroupState(state.ranks, max(state.issued, number), pending)
    return states


class Wait(NamedTuple):
    """Collective in which a rank waits, and the ranks that have not issued it."""

    collective: str
    missing_ranks: frozenset[int]


def find_waits(states: Mapping[int, Mapping[str, GroupState]], silent_ranks: Collection[int]) -> dict[int, Wait]:
    """Return for whom each rank waits, from the collectives of each rank that makes no progress. A silent rank sends no
    heartbeats, so it counts as one that has not issued a collective that others wait in."""
    waits = {}
    for rank, groups in states.items():
        for name, state in groups.items():
            if rank in silent_ranks or state.pending is None or rank in waits:
                continue
            number, collective = state.pending
            missing_ranks = frozenset(
                other_rank
                for other_rank in state.ranks
                if other_rank in silent_ranks
                or (other_rank in states and _issued(states[other_rank].get(name)) < number)
            )
            if missing_ranks:
                waits[rank] = Wait(f"{collective} {number:,}", missing_ranks)
    return waits


def _issued(state: GroupState | None) -> int:
    return state.issued if state else 0


def awaited_ranks(waits: Mapping[int, Wait]) -> frozenset[int]:
    """Return the ranks that others wait for and that themselves wait for nobody."""
    return frozenset().union(*(wait.missing_ranks for wait in waits.values())) - waits.keys()


def write_stacks_on_signal() -> None:
    """Let this process write the Python stacks of all its threads when it gets `STACK_SIGNAL`; on Linux only."""
    if hasattr(os, "memfd_create"):
        # A file in memory is found by its name in /proc and leaves nothing behind if the process is killed.
        faulthandler.register(STACK_SIGNAL, os.memfd_create(_STACK_FILE), all_threads=True)


class ProcessState(NamedTuple):
    """State of a rank's process: what it does, in words, and the Python stacks of its threads, which may be missing."""

    activity: str
    stacks: str = ""


def read_process(pid: int) -> ProcessState:
    """Return the state of a process of this machine, which writes its stacks unless it is stopped."""
    status = psutil.Process(pid).status()
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return ProcessState("stopped")
    descriptors = [path for path in Path(f"/proc/{pid}/fd").glob("*") if _STACK_FILE in str(path.readlink())]
    if not descriptors:
        return ProcessState(status)
    file = descriptors[0]
    old_size = last_size = file.stat().st_size
    os.kill(pid, STACK_SIGNAL)
    deadline = time.monotonic() + _WRITE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        size = file.stat().st_size
        if size == last_size > old_size:
            break
        last_size = size
    stacks = file.read_bytes()[old_size:].decode(errors="replace")
    return ProcessState(training_location(stacks) or status, stacks)


def training_location(stacks: str) -> str | None:
    """Return the function, file and line where the thread that trains is: the innermost frame outside of libraries."""
    thread = next((block for block in stacks.split("\n\n") if " in train_worker\n" in f"{block}\n"), "")
    frames = re.findall(r'File "(.*)", line (\d+) in (.*)', thread)
    own_frames = [f for f in frames if "/mhmoe_ray/" in f[0] or not re.search(r"/lib/python3[.\d]*/|^<", f[0])]
    return next((f"in {function} ({Path(path).name}:{line})" for path, line, function in own_frames), None)
