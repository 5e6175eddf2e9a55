"""Functions that wait for events of a run on a cluster, as its run directory shows them."""

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
"""Default timeout in seconds of every wait: long, since it only ends tests that hang."""


def wait_until(condition: Callable[[], T], description: str, seconds: float = LIMIT) -> T:
    """Call `condition` until it returns a true value, and return that value.

    After `seconds` an AssertionError is raised that contains `description`.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {description}"
        time.sleep(0.02)
    return value


def newest_run(project: Path) -> RunDir:
    """Return the run in the storage `runs` of a project folder that was created last."""
    return list_runs(project / "runs")[-1]


def events_of_kind(run: RunDir, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind that the run has recorded."""
    return [e for e in events.read(run) if e["event"] == kind]


def start_events(run: RunDir) -> list[dict[str, Any]]:
    """Return the `started` events of a run: one for each time that its workers were started."""
    return events_of_kind(run, "started")


def step_of(run: RunDir) -> int:
    """Return the last step in the run's history, or 0 if there is none."""
    last_line = history.last_line(run)
    return last_line[metrics.STEP] if last_line else 0


def run_has_ended(run: RunDir) -> bool:
    """Return whether the run has recorded an end: it is finished, stopped or failed."""
    return events.is_end_state(events.state(events.read(run)))


def wait_for_end(run: RunDir, seconds: float = LIMIT, state: str = "finished") -> None:
    """Wait until the run has ended, and assert that it ended in `state`."""
    wait_until(lambda: run_has_ended(run), "the end of the run", seconds)
    run_events = events.read(run)
    assert events.state(run_events) == state, run_events[-3:]


def end_by_ctrl_c(process: subprocess.Popen[str]) -> str:
    """Send SIGINT, as Ctrl-C does, until the process ends; return what it wrote to standard error."""
    # SIGINT is repeated, as a person repeats Ctrl-C, because Python loses a SIGINT that comes while it finalises an
    # object.
    for _ in range(6):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[1]
    raise AssertionError("Ctrl-C does not end it")
