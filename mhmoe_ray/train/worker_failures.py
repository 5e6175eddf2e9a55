"""Record of workers that fail: which rank was the first cause, why, and what it wrote last.

Ray Train restarts the worker group without reporting this, and its logs are gone with the cluster.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

import ray.train
from ray.exceptions import RayTaskError

from mhmoe_ray.errors import MhmoeError, StorageError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import location
from mhmoe_ray.train.preemption import PreemptedError

LINES = 40
"""Number of last lines of a worker's log that are recorded."""
LOG_SECONDS = 5
SAME_SECONDS = 20.0
"""Seconds within which a failure of the same ranks counts as one failure of the same worker group: while nodes are
preempted, Ray Train reports the ranks at every poll."""


class RecordLost(ray.train.UserCallback):
    """Callback that records failed workers as an event.

    Ray Train calls it in the process that monitors the workers.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = str(run.path)
        self._told: tuple[frozenset[int], float] = frozenset(), 0.0

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        if all(isinstance(cause, PreemptedError) for cause in worker_exceptions.values()):
            return  # they have recorded it themselves
        (before, when), now = self._told, time.monotonic()
        self._told = frozenset(worker_exceptions), now
        if before == frozenset(worker_exceptions) and now - when < SAME_SECONDS:
            return
        run, found = RunDir(location(self._run)), causes(worker_exceptions)
        rank = first_cause(found)
        cause = found[rank]
        told = {"rank": rank, "ranks": len(worker_exceptions), "reason": reason(cause)}
        try:
            place = _place(run, rank)
            # An error of ours says all there is to say; what is logged with it is a traceback.
            lines = [] if isinstance(cause, MhmoeError) else _last_lines(place)
            events.record(run, "lost", **told, host=place.get("host"), lines=lines)
        except (OSError, StorageError) as e:  # the group is started again all the same
            print(f"warning: rank {rank} failed ({told['reason']}), but {e}")


def causes(failures: Mapping[int, Exception]) -> dict[int, Exception]:
    """Return the error that each rank failed with.

    For an error in a remote task that the rank called, this is the original error, not Ray's error with its traceback.
    """
    return {
        rank: error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
        for rank, error in failures.items()
    }


def first_cause(causes: Mapping[int, Exception]) -> int:
    """Return the rank whose failure caused the others, since others fail in their collective operations with it.

    Preferred is a rank with an error of this package, then a rank whose process is gone, then a rank that failed
    anywhere but in a collective operation. The lowest of equal ranks is returned.
    """

    def order(rank: int) -> tuple[bool, bool, bool, int]:
        cause = causes[rank]
        in_exchange = re.search(r"gloo|nccl|connection (closed|reset)|timed out waiting", str(cause), re.IGNORECASE)
        return not isinstance(cause, MhmoeError), not hasattr(cause, "health_check_failure"), bool(in_exchange), rank

    return min(causes, key=order)


def reason(cause: Exception) -> str:
    """Return the reason of a failure in one line, of at most 500 characters unless it is an error of this package."""
    if hasattr(cause, "health_check_failure"):
        cause = cause.health_check_failure
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        # Ray's last line has a kind, a detail, and guesses.
        match = re.search(
            r"Worker exit type: (\w+) Worker exit detail: (.*?)( Some common causes.*)?$", (lines or [""])[-1]
        )
        told = f"{match[1]}, {match[2]}" if match else (lines or [type(cause).__name__])[-1]
        return f"its process is gone: {told}"[:500]
    if isinstance(cause, MhmoeError):
        return str(cause)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:500]


def _place(run: RunDir, rank: int) -> dict[str, Any]:
    """Return the recorded process of a rank of the worker group that runs now.

    It is empty for ranks that fail before their worker group has started, because no process is recorded yet.
    """
    kinds = ("began", "restoring", "started", "lost", "preempted")
    newest = next((e for e in reversed(events.events(run)) if e["event"] in kinds), None)
    workers = newest["workers"] if newest and newest["event"] == "started" else []
    return next((worker for worker in workers if worker["rank"] == rank), {})


def _last_lines(place: Mapping[str, Any]) -> list[str]:
    """Return the last lines that a process wrote, at most `LINES` of them; none where its node is gone.

    The lines are from its stderr, or from its stdout if it wrote nothing to stderr.
    """
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    for suffix in ("err", "out") if place else ():
        try:
            parts = get_log(
                node_id=place["node"],
                pid=place["pid"],
                suffix=suffix,
                tail=LINES,
                timeout=LOG_SECONDS,
                errors="replace",
            )
            lines = [line for line in "".join(parts).splitlines() if line.strip()]
        except (RayStateApiException, OSError) as e:
            print(f"the log of process {place['pid']} on {place['host']} cannot be read: {e}")
            continue
        if lines:
            return lines
    return []
