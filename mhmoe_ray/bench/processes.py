"""Measurements each in a process of its own, and the memory of a process and its children, as Linux counts it."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, NamedTuple, Self

from mhmoe_ray.bench.timing import failure
from mhmoe_ray.cluster.spawn import PRIVATE
from mhmoe_ray.spec import RunSpec

EVERY_SECONDS = 0.2


class Usage(NamedTuple):
    resident: int
    """Bytes in memory, those that it shares with others included."""
    own: int
    """Without pages of files and of shared memory, such as Ray's object store."""


class Peak:
    """While it is entered, the largest memory that any one process had: this one, or one below it."""

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
    """All processes below one, without it."""
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
    """Nothing for a process that has ended."""
    entry = Path("/proc") / str(pid)
    return Usage(*(1024 * int(_field(entry, name).split()[0]) for name in ("VmRSS:", "RssAnon:")))


def _field(entry: Path, name: str) -> str:
    try:
        lines = (entry / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return "0"
    return next((line.removeprefix(name).strip() for line in lines if line.startswith(name)), "0")


Measurement = Callable[[RunSpec, Path, int], dict[str, Any]]
"""Of a spec, in an empty folder, with so many processes or threads; returns figures that JSON can hold."""


def run_apart(measurement: Measurement, spec: RunSpec, number: int, what: str, **more: str) -> dict[str, Any]:
    """What it returns.

    Args:
        measurement: a function of a module.
        spec: its first argument.
        number: its last.
        what: names it in an error.
        more: variables of its environment.

    Raises:
        JobError: it failed.
    """
    folder = tempfile.mkdtemp(prefix="mhmoe-bench-")
    place = {"module": measurement.__module__, "function": measurement.__qualname__}
    request = json.dumps({**place, "spec": spec.model_dump_json(), "folder": folder, "number": number})
    ray = PRIVATE | {"RAY_AUTH_TOKEN": token_hex(32)}  # of a Ray of its own
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=request, text=True, capture_output=True, env=os.environ | ray | more)
    finally:
        shutil.rmtree(folder)
    if done.returncode:
        raise failure(what, done.stderr, done.returncode)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    request = json.load(sys.stdin)
    measurement: Measurement = getattr(importlib.import_module(request["module"]), request["function"])
    spec = RunSpec.model_validate_json(request["spec"])
    print(json.dumps(measurement(spec, Path(request["folder"]), request["number"])))


if __name__ == "__main__":
    main()
