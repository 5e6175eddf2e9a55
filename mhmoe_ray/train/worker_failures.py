"""Record of failed workers: the rank that is the root cause, the reason, and the last lines of its log.

Ray Train restarts the worker group without reporting any of this, and Ray's logs are lost when the cluster ends.
"""

import os
import re
import time
from collections.abc import Mapping
from typing import Any

import ray.train

from mhmoe_ray.errors import MhmoeError, StorageError, task_error
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import AttemptId, RunDir, is_newest_attempt
from mhmoe_ray.runs.logs import Redactor
from mhmoe_ray.storage import location
from mhmoe_ray.train.preemption import PreemptedError

LOG_LINES = 40  # last lines of a worker's log that are recorded
LOG_TIMEOUT_SECONDS = 5
DUPLICATE_SECONDS = 20.0
"""Seconds within which reports of the same failed ranks count as one failure, unless a new worker group began."""


class WorkerFailureCallback(ray.train.UserCallback):
    """Ray Train callback that records failed workers as a "lost" event, except preempted ones. It runs in the process
    that monitors the workers."""

    def __init__(self, run: RunDir, attempt: AttemptId) -> None:
        self._run, self._attempt = str(run.path), attempt
        self._last_failure: tuple[frozenset[int], float] = frozenset(), 0.0

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        """Record the reason and the last log lines of the rank that caused the failure, with secrets replaced."""
        if all(isinstance(error, PreemptedError) for error in worker_exceptions.values()):
            # The workers have recorded the preemption themselves, as an event.
            return
        # While nodes are preempted, Ray Train reports the same failed ranks at every poll. Only the first report is
        # recorded. The same ranks may also fail soon again in a new worker group, which is a new failure.
        (previous_ranks, previous_time), current_time = self._last_failure, time.monotonic()
        self._last_failure = frozenset(worker_exceptions), current_time
        may_be_repeated = (
            previous_ranks == frozenset(worker_exceptions) and current_time - previous_time < DUPLICATE_SECONDS
        )
        run, (rank, error) = RunDir(location(self._run)), root_cause(worker_exceptions)
        redact = Redactor(os.environ)
        fields = {"rank": rank, "ranks": len(worker_exceptions), "reason": redact(failure_reason(error))}
        try:
            if may_be_repeated and events.newest_group_event(events.read(run)).get("event") == "lost":
                return
            worker = _recorded_worker(run, rank)
            # If the error is one of this package, its message is complete. The log lines would only repeat it with a
            # traceback.
            lines = [] if isinstance(error, MhmoeError) else _last_lines(worker)
            if is_newest_attempt(run, self._attempt):
                events.record(run, "lost", **fields, host=worker.get("host"), lines=[redact(line) for line in lines])
        except (OSError, StorageError) as e:
            # An error here must not keep Ray Train from restarting the worker group.
            print(f"warning: rank {rank} failed ({fields['reason']}), but the event cannot be recorded: {e}")


def root_cause(failures: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Return the rank whose failure caused those of the others, and its error: most likely one with an error of this
    package, then one whose process is gone, then one that failed outside of a collective operation; of equals, the
    lowest."""
    errors = {rank: task_error(error) for rank, error in failures.items()}

    def priority(rank: int) -> tuple[bool, bool, bool, int]:
        error = errors[rank]
        # When one rank fails, the other ranks fail in their collective operations with it. So an error of a collective
        # operation is rarely the root cause.
        is_collective_error = re.search(
            r"gloo|nccl|connection (closed|reset)|timed out waiting", str(error), re.IGNORECASE
        )
        return (
            not isinstance(error, MhmoeError),
            not hasattr(error, "health_check_failure"),
            bool(is_collective_error),
            rank,
        )

    rank = min(errors, key=priority)
    return rank, errors[rank]


def failure_reason(error: Exception) -> str:
    """Return the reason of a worker's failure in one line of at most 500 characters; errors of this package keep
    theirs."""
    if hasattr(error, "health_check_failure"):
        error = error.health_check_failure
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The last line of Ray's message has a kind, a detail, and guesses about common causes. The guesses are left
        # out.
        match = re.search(
            r"Worker exit type: (\w+) Worker exit detail: (.*?)( Some common causes.*)?$", (lines or [""])[-1]
        )
        detail = f"{match[1]}, {match[2]}" if match else (lines or [type(error).__name__])[-1]
        return f"its process is gone: {detail}"[:500]
    if isinstance(error, MhmoeError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:500]


def _recorded_worker(run: RunDir, rank: int) -> dict[str, Any]:
    """Return a rank's process as the event "started" recorded it; empty if the current worker group has not started."""
    # If the newest event is not "started", the recorded processes are those of an earlier worker group.
    newest_event = events.newest_group_event(events.read(run))
    workers = newest_event["workers"] if newest_event.get("event") == "started" else []
    return next((worker for worker in workers if worker["rank"] == rank), {})


def _last_lines(worker: Mapping[str, Any]) -> list[str]:
    """Return the last `LOG_LINES` lines of a worker's stderr or, if that is empty, of its stdout; none if its node is
    gone."""
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    for suffix in ("err", "out") if worker else ():
        try:
            parts = get_log(
                node_id=worker["node"],
                pid=worker["pid"],
                suffix=suffix,
                tail=LOG_LINES,
                timeout=LOG_TIMEOUT_SECONDS,
                errors="replace",
            )
            lines = [line for line in "".join(parts).splitlines() if line.strip()]
        except (RayStateApiException, OSError) as e:
            print(f"the log of process {worker['pid']} on {worker['host']} cannot be read: {e}")
            continue
        if lines:
            return lines
    return []
