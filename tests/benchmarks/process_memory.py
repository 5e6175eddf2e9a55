"""Memory of a process and its descendants, as counted by Linux."""

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

POLL_SECONDS = 0.2


class MemoryUsage(NamedTuple):
    """Memory of one process in bytes."""

    resident: int
    """Resident bytes, including those shared with other processes."""
    private: int
    """Resident bytes without pages of files and of shared memory, such as Ray's object store."""


class PeakMemory:
    """Context manager that records the peak memory of any single process while it is open: this one or a descendant.

    Afterwards `resident` and `private` have the largest values of `MemoryUsage`.
    """

    def __init__(self) -> None:
        self.resident = self.private = 0
        self._stop_event = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_event.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop_event.is_set():
            for pid in [os.getpid(), *descendants(os.getpid())]:
                usage = memory_usage(pid)
                self.resident, self.private = max(self.resident, usage.resident), max(self.private, usage.private)
            time.sleep(POLL_SECONDS)


def descendants(root: int) -> list[int]:
    """Return the ids of all descendants of a process, without the process itself."""
    # Not every Linux kernel lists a process's children in /proc, but each names the parent, by which children are
    # found.
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = _status_field(entry, "PPid:")
            children.setdefault(int(parent), []).append(int(entry.name))
    descendant_ids, pending_ids = list[int](), [root]
    while pending_ids:
        child_ids = children.get(pending_ids.pop(), [])
        descendant_ids += child_ids
        pending_ids += child_ids
    return descendant_ids


def memory_usage(pid: int) -> MemoryUsage:
    """Return the memory of a process; zeros if it has ended."""
    entry = Path("/proc") / str(pid)
    return MemoryUsage(*(1024 * int(_status_field(entry, name).split()[0]) for name in ("VmRSS:", "RssAnon:")))


def _status_field(entry: Path, name: str) -> str:
    try:
        lines = (entry / "status").read_text().splitlines()
    # The process may have ended since its folder was listed.
    except (FileNotFoundError, ProcessLookupError):
        return "0"
    return next((line.removeprefix(name).strip() for line in lines if line.startswith(name)), "0")
