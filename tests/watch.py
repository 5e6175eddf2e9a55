"""Waiting for events of a run on a cluster, seen from outside in its directory."""

import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import RunDir, list_runs

T = TypeVar("T")
LIMIT = 400.0
"""Seconds within which every awaited event must have come: a watchdog of the tests, not a measurement."""


def wait_until(condition: Callable[[], T], description: str, seconds: float = LIMIT) -> T:
    """Wait until the condition gives a true value, and return that value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {description}"
        time.sleep(0.02)
    return value


def newest(project: Path) -> RunDir:
    return list_runs(project / "runs")[-1]


def of_kind(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [e for e in events.read(run) if e["event"] == kind]


def start_events(run: RunDir) -> list[dict[str, Any]]:
    """Return the events of the starts of the run's workers."""
    return of_kind(run, "started")


def step_of(run: RunDir) -> int:
    last_line = history.last_line(run)
    return last_line[metrics.STEP] if last_line else 0


def is_over(run: RunDir) -> bool:
    return events.is_end_state(events.state(events.read(run)))


def wait_for_the_end(run: RunDir, seconds: float = LIMIT, state: str = "finished") -> None:
    wait_until(lambda: is_over(run), "the end of the run", seconds)
    run_events = events.read(run)
    assert events.state(run_events) == state, run_events[-3:]


def ended_by_ctrl_c(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C until the process ends, and return what it has written to standard error.

    Ctrl-C is pressed again as a person would: Python loses one that comes while it finalises an object.
    """
    for _ in range(6):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[1]
    raise AssertionError("Ctrl-C does not end it")
