"""Run of a command on many mutants of its files, each checked against the promise about users' files.

A damaged file may be accepted, or it gives one line and a documented exit code, in bounded time and memory. A forked
child process tries several mutants one after another, because a new interpreter takes a second. A child that dies or
takes too long names its mutant in a file.
"""

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mhmoe_ray.errors import MhmoeError
from tests.fuzz.mutants import mutated_file

MAX_SECONDS, MAX_BYTES = 10, 500_000_000
"""Largest processor time and growth of a mutant. A busy machine does not lengthen the processor time."""
HANG_SECONDS = 90
"""Time after which a mutant counts as one that never ends."""
EXIT_CODES = {0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}
MUTANTS_PER_CHILD = 50


class Kind(NamedTuple):
    """Kind of file: where its files lie in a project folder, and what reads them."""

    patterns: tuple[str, ...]
    """Glob patterns of the files that are damaged."""
    read: Callable[[Path], int]
    """Function that reads the project folder, and returns an exit code; an `MhmoeError` counts as its exit code."""
    rarity: int = 1
    """Number by which the number of mutants is divided, because each takes long."""


class Finding(NamedTuple):
    """Mutant that broke the promise."""

    seed: int
    file: str
    failure: str
    """What happened, such as the last lines of a traceback."""


class Figures(NamedTuple):
    """Result of fuzzing one kind of file."""

    mutants: int
    refused_count: int
    longest_seconds: float
    """Longest processor time of a mutant in seconds."""
    largest_growth: int
    """Largest growth of the process by a mutant in bytes."""
    findings: list[Finding]


def fuzz(kind: Kind, project: Path, workspace: Path, seeds: range) -> Figures:
    """Try a mutant of the project for each seed, and return what broke the promise; the project stays as it is."""
    refused_count, longest_seconds, largest_growth, findings = 0, 0.0, 0, list[Finding]()
    waiting_seeds = list(seeds)
    while waiting_seeds:
        batch = waiting_seeds[:MUTANTS_PER_CHILD]
        record = workspace / "record"
        record.write_text("")
        status = _run_child(kind, project, workspace, batch, record)
        lines = [line.split("\t", 4) for line in record.read_text().splitlines()]
        for _, seconds, growth, outcome, details in (line for line in lines if len(line) == 5):
            longest_seconds, largest_growth = max(longest_seconds, float(seconds)), max(largest_growth, int(growth))
            refused_count += outcome == "refused"
            if outcome == "failed":
                seed, file, failure = details.split("\t", 2)
                findings.append(Finding(int(seed), file, failure.replace("\\n", "\n")))
        finished_seeds = {int(line[0]) for line in lines if len(line) == 5}
        started_seeds = [int(line[0]) for line in lines if len(line) == 2]
        waiting_seeds = [seed for seed in waiting_seeds if seed not in finished_seeds]
        if status:
            [dead_seed] = [seed for seed in started_seeds if seed not in finished_seeds][-1:] or waiting_seeds[:1]
            findings.append(Finding(dead_seed, "", f"the process ended with status {status}"))
            waiting_seeds.remove(dead_seed)
    return Figures(len(seeds), refused_count, longest_seconds, largest_growth, findings)


def _run_child(kind: Kind, project: Path, workspace: Path, batch: list[int], record: Path) -> int:
    """Try mutants in a forked process, and return its wait status; one without progress is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            for seed in batch:
                _try_mutant(kind, project, workspace, seed, record)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    last_change = time.monotonic()
    size = -1
    while True:
        ended_pid, status = os.waitpid(pid, os.WNOHANG)
        if ended_pid:
            return status
        if (new_size := record.stat().st_size) != size:
            size, last_change = new_size, time.monotonic()
        if time.monotonic() - last_change > 2 * HANG_SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _try_mutant(kind: Kind, project: Path, workspace: Path, seed: int, record: Path) -> None:
    """Try one mutant, and append its outcome to the record."""
    chooser = random.Random(seed)
    folder = workspace / "project"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(project, folder, symlinks=True)
    files = sorted(file for pattern in kind.patterns for file in folder.glob(pattern) if file.is_file())
    file = chooser.choice(files)
    mutated_file(file, chooser)
    with record.open("a") as stream:
        stream.write(f"{seed}\t{file.relative_to(folder)}\n")
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    failure, code = None, 0
    output = io.StringIO()
    with _deadline(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = kind.read(folder)
        except MhmoeError as e:
            code = e.exit_code
            if "\n" in str(e) or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in str(e)):
                failure = f"the message is not one printable line: {str(e)!r}"[:300]
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0
        except BaseException:
            failure = "".join(traceback.format_exc()[-1800:])
    seconds = time.process_time() - start
    memory_growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before) * 1024
    if failure is None and code not in EXIT_CODES:
        failure = f"exit code {code}: {output.getvalue()[-300:]}"
    if failure is None and seconds > MAX_SECONDS:
        failure = f"it took {seconds:.1f} s"
    if failure is None and memory_growth > MAX_BYTES:
        failure = f"it took {memory_growth / 1e6:.0f} MB"
    outcome = "failed" if failure else "refused" if code else "accepted"
    text = (failure or "").encode(errors="replace").decode().replace("\n", "\\n").replace("\r", "\\r")
    with record.open("a") as stream:
        stream.write(f"{seed}\t{seconds:.3f}\t{memory_growth}\t{outcome}\t{seed}\t{file.relative_to(folder)}\t{text}\n")


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Interrupt Python code that takes longer than `HANG_SECONDS`."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"more than {HANG_SECONDS} s")

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def run_command(folder: Path, *args: str) -> int:
    """Run `mhmoe args` in a folder, in this process, and return its exit code."""
    from mhmoe_ray.cli.app import main

    os.chdir(folder)
    sys.argv = ["mhmoe", *args]
    try:
        main()
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(bool(e.code))
    return 0
