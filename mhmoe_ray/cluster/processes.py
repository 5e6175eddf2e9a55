"""Whose process is it? Told by an environment variable with the cluster's own folder, which children inherit."""

import importlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "MHMOE_CLUSTER"


def is_ours(pid: int, folder: Path) -> bool:
    """Whether this process is the `ray start` we gave that folder. A pid alone may be somebody else's by now."""
    psutil = _psutil()
    try:
        return str(folder) in " ".join(psutil.Process(pid).cmdline())  # a zombie has no command line
    except psutil.Error:
        return False


def family(pid: int) -> list[Any]:
    """A process and all below it."""
    psutil = _psutil()
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def marked(folder: Path) -> list[Any]:
    """Processes with that folder in their environment, this one excepted: jobs may have outlived their parents.

    Ray's workers and dashboard modules overwrite their environment with a title, so they are found by `family` only.
    """
    psutil = _psutil()
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def end(processes: Sequence[Any], *, patience: float, ask: bool = False) -> None:
    """Wait for these to end by themselves, or because asked with SIGTERM, for so many seconds; kill the rest.

    psutil compares start times before it sends a signal, so it never meets another process of the same pid.
    """
    psutil = _psutil()
    for process in processes if ask else ():
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=patience)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


def _psutil() -> Any:
    import ray  # noqa: F401 - Ray brings a psutil of its own, which can be imported once ray is

    return importlib.import_module("psutil")
