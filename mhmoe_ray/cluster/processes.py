"""Whose process is it? Told by an environment variable with the cluster's own folder, which children inherit."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "MHMOE_CLUSTER"


def is_ours(pid: int, folder: Path) -> bool:
    """Whether this process is the `ray start` we gave that folder. A pid alone may be somebody else's by now."""
    try:
        return str(folder) in " ".join(psutil.Process(pid).cmdline())  # a zombie has no command line
    except psutil.Error:
        return False


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def marked(folder: Path) -> list[psutil.Process]:
    """Processes with that folder in their environment, this one excepted: jobs may have outlived their parents.

    Ray's workers and dashboard modules overwrite their environment with a title, so they are found by `family` only.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def end(processes: Sequence[psutil.Process], *, patience: float, ask: bool = False) -> None:
    """Wait for these to end by themselves, or because asked with SIGTERM, for so many seconds; kill the rest.

    psutil compares start times before it sends a signal, so it never meets another process of the same pid.
    """
    for process in processes if ask else ():
        with suppress(psutil.Error):
            process.terminate()
    alive = _alive_after(patience, processes)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    _alive_after(10, alive)


def _alive_after(seconds: float, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end within that time. One whose parent does not ask for its end is over, too: in a container
    that may be the first process, which never asks."""
    deadline = time.monotonic() + seconds
    while True:
        _, alive = psutil.wait_procs(processes, timeout=0)
        alive = [process for process in alive if not _is_over(process)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def _is_over(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
