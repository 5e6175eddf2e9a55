"""Memory of a process and its descendants, as Linux counts it."""

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

EVERY_SECONDS = 0.2


class Usage(NamedTuple):
    resident: int
    """Bytes in memory, including those shared with other processes."""
    own: int
    """Bytes in memory without pages of files and of shared memory, such as Ray's object store."""


class Peak:
    """Context that records the largest memory of any one process, this one or a descendant, while it is entered."""

    def __init__(self) -> None:
        self.resident = self.own = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            for pid in [os.getpid(), *descendants(os.getpid())]:
                usage = usage_of(pid)
                self.resident, self.own = max(self.resident, usage.resident), max(self.own, usage.own)
            time.sleep(EVERY_SECONDS)


def descendants(root: int) -> list[int]:
    """Return the ids of all descendants of a process, without the process itself."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = _field(entry, "PPid:")
            children.setdefault(int(parent), []).append(int(entry.name))
    found, seen = list[int](), [root]
    while seen:
        below = children.get(seen.pop(), [])
        found += below
        seen += below
    return found


def usage_of(pid: int) -> Usage:
    """Return the memory of a process; zeros if it has ended."""
    entry = Path("/proc") / str(pid)
    return Usage(*(1024 * int(_field(entry, name).split()[0]) for name in ("VmRSS:", "RssAnon:")))


def _field(entry: Path, name: str) -> str:
    try:
        lines = (entry / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return "0"
    return next((line.removeprefix(name).strip() for line in lines if line.startswith(name)), "0")
