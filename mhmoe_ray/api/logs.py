"""The log lines of a run's newest attempt, or of one of its workers, from the cluster or from the run directory."""

import re
from collections.abc import Iterator
from itertools import chain
from queue import Empty, Queue
from threading import Thread
from typing import Any

from mhmoe_ray.api.defaults import OnNote, ignore_note
from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.cluster.dashboard import RetryingCaller
from mhmoe_ray.cluster.nodes import process_log
from mhmoe_ray.cluster.runs import outcome, recorded_outcome
from mhmoe_ray.errors import ClusterError, JobError, RunError, TokenError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, last_attempt, newest_attempt_number
from mhmoe_ray.runs.logs import archived_lines

OUTCOME_CHECK_SECONDS = 2.0
"""Seconds without a new line in a worker's log, after which the cluster is asked whether the run is over."""


def log_lines(
    run: RunDir, rank: int | None = None, *, follow: bool = False, on_note: OnNote = ignore_note
) -> Iterator[str]:
    """Return the log lines of a run's newest attempt: those of the whole job, or those of the worker with a given rank.

    They come from the cluster or, if that is gone, from the copy in the run directory. Ray colours the prefixes of
    workers' lines; `without_colours` removes the colours.

    Args:
        run: the run whose log is read.
        rank: rank of the worker whose lines are returned; None for those of the whole job.
        follow: whether to continue with new lines until the run ends.
        on_note: callback that gets a line of text about where the lines come from.

    Raises:
        RunError: the run was imported; or no workers have started yet, or there is no such rank.
        ClusterError, JobError: the cluster does not answer or no longer has the log, and the run directory has no copy.
        TokenError: the cluster asks for another token.
    """
    attempt = last_attempt(run)
    try:
        connection = connect(attempt.address)
        if rank is not None:
            return _worker_log(run, connection, rank, follow, on_note)
        if jobs.status(connection, attempt.job) is None:
            raise JobError(f"job {attempt.job}", "the cluster does not know it", "see `mhmoe list`")
        if follow:
            return jobs.follow_logs(connection, attempt.job)
        return iter(jobs.logs(connection, attempt.job).splitlines())
    except (ClusterError, JobError) as e:
        stored_lines = archived_lines(run, newest_attempt_number(run))
        # A cluster that refuses the token still has the log. The error is raised, so that the user fixes the token.
        if isinstance(e, TokenError) or stored_lines is None:
            raise
        on_note(f"from {run.logs}, because the cluster no longer has the lines ({e.subject}: {e.reason})")
        return stored_lines if rank is None else _worker_lines(stored_lines, _worker_entry(run, rank)["pid"])


def without_colours(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines of a log without the terminal codes that colour them."""
    return (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines)


def _worker_log(run: RunDir, connection: Connection, rank: int, follow: bool, on_note: OnNote) -> Iterator[str]:
    """Return the lines of one worker: those of its stdout, which is mostly empty, and then its stderr with the log.

    Args:
        run: the run whose log is read.
        connection: connection to the cluster on which the run is or was.
        rank: rank of the worker.
        follow: whether to continue with new lines until the run ends.
        on_note: callback that gets a line of text that names the worker's process and host.

    Raises:
        RunError: no workers have started yet, or there is no such rank.
        ClusterError, JobError: the cluster does not answer, or no longer has the log.
    """
    worker = _worker_entry(run, rank)
    on_note(f"rank {rank}: process {worker['pid']} on {worker['host']}")
    log_address = connection, worker["node"], worker["pid"]
    printed_lines = process_log(*log_address, "out")
    # `process_log` is a generator: it asks the cluster only when its first line is read. The first line is read here,
    # so that the error of a missing log is raised inside the caller's `try`.
    first_line = next(printed_lines, None)
    printed_lines = chain([first_line] if first_line is not None else [], printed_lines)
    if not follow or recorded_outcome(events.read(run)):
        return chain(printed_lines, process_log(*log_address, "err"))
    return chain(
        printed_lines, _lines_until_end(process_log(*log_address, "err", follow=True), run, connection, on_note)
    )


def _worker_lines(lines: Iterator[str], pid: int) -> Iterator[str]:
    """Return the lines of a job's log that a worker wrote, without Ray's prefix that names the process."""
    prefix = re.compile(rf"^(\x1b\[[0-9;]*m)*\([^()]*\bpid={pid}\b[^()]*\)(\x1b\[[0-9;]*m)* ?")
    return (prefix.sub("", line) for line in lines if prefix.match(line))


def _worker_entry(run: RunDir, rank: int) -> dict[str, Any]:
    """Return the entry of a worker, by its rank, in the run's newest `started` event.

    Raises:
        RunError: no workers have started yet, or there is no such rank.
    """
    started_event = events.newest_event(events.read(run), "started")
    if started_event is None:
        raise RunError(
            f"run {run.id}", "its workers have not started yet", f"see the log of its job: `mhmoe logs {run.id}`"
        )
    worker = next((w for w in started_event["workers"] if w["rank"] == rank), None)
    if worker is None:
        reason = f"it has ranks 0 to {len(started_event['workers']) - 1}"
        raise RunError(f"rank {rank} of run {run.id}", reason, "name one of them")
    return dict(worker)


def _lines_until_end(lines: Iterator[str], run: RunDir, connection: Connection, on_note: OnNote) -> Iterator[str]:
    """Yield the lines of a log that never ends by itself, until the run has ended and no more lines arrive."""
    line_queue, retrying_caller, run_outcome = Queue[str | Exception | None](), RetryingCaller(on_note), None

    def fill_queue() -> None:
        try:
            for line in lines:
                line_queue.put(line)
            line_queue.put(None)
        except Exception as e:
            line_queue.put(e)

    # Ray follows a file forever, even if no process writes to it any more, so a read may block forever. A daemon thread
    # reads the lines, because it does not keep this process from ending.
    Thread(target=fill_queue, daemon=True).start()
    while True:
        try:
            item = line_queue.get(timeout=OUTCOME_CHECK_SECONDS)
        except Empty:
            # The last lines may arrive after the outcome is known, so one more interval must pass without a line.
            if run_outcome:
                return
            run_outcome = retrying_caller.call(lambda: outcome(run, connection), None)
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        yield item
