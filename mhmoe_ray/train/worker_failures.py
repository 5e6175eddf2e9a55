"""Workers that fail, for the record: which rank was the first cause, why, and what it wrote last.

Ray Train starts the group again without a word to anyone; and its logs are gone with the cluster.
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
"""Of a worker's log that are kept."""
LOG_SECONDS = 5
SAME_SECONDS = 20.0
"""Within which the same ranks are those of the same group: while nodes are taken away, Ray Train tells of them at every
poll."""


class RecordLost(ray.train.UserCallback):
    """Ray Train calls it in the process that watches over workers."""

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
    """What each rank failed of; of an error in a process that it called, that error, not Ray's with its traceback."""
    return {
        rank: error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
        for rank, error in failures.items()
    }


def first_cause(causes: Mapping[int, Exception]) -> int:
    """When one rank fails, others fail in their exchanges with it: that with an error of ours, else one whose process
    is gone, else one that failed anywhere but in an exchange."""

    def order(rank: int) -> tuple[bool, bool, bool, int]:
        cause = causes[rank]
        in_exchange = re.search(r"gloo|nccl|connection (closed|reset)|timed out waiting", str(cause), re.IGNORECASE)
        return not isinstance(cause, MhmoeError), not hasattr(cause, "health_check_failure"), bool(in_exchange), rank

    return min(causes, key=order)


def reason(cause: Exception) -> str:
    """In one line."""
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
    """Of the workers that run now; those that fail before they have started have no place yet."""
    kinds = ("began", "restoring", "started", "lost", "preempted")
    newest = next((e for e in reversed(events.events(run)) if e["event"] in kinds), None)
    workers = newest["workers"] if newest and newest["event"] == "started" else []
    return next((worker for worker in workers if worker["rank"] == rank), {})


def _last_lines(place: Mapping[str, Any]) -> list[str]:
    """What that process wrote last, errors before the rest; none where its node is gone."""
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
