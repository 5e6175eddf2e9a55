"""The log lines of a run's newest attempt, or of one of its workers, from the cluster or from the run directory."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from queue import Empty, Queue
from threading import Thread
from typing import Any

from mhmoe_ray.api.defaults import OnNote, ignore_note
from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect_recorded
from mhmoe_ray.cluster.dashboard import RetryingCaller
from mhmoe_ray.cluster.nodes import process_log
from mhmoe_ray.cluster.runs import Outcome, outcome, recorded_outcome
from mhmoe_ray.errors import ClusterError, JobError, RunError, TokenError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, last_attempt, newest_attempt_number
from mhmoe_ray.runs.logs import archived_lines

OUTCOME_CHECK_SECONDS = 2.0
"""Seconds without a new line in a worker's log, after which the cluster is asked whether the run is over."""


def log_lines(
    run: RunDir, rank: int | None = None, *, follow: bool = False, on_note: OnNote = ignore_note
) -> Iterator[str]:
    """Return the log lines of a run's newest attempt, as `Run.logs` does, with the colours of Ray's prefixes."""
    attempt = last_attempt(run)
    try:
        connection = connect_recorded(attempt.address)
        if rank is not None:
            return _worker_log(run, connection, rank, follow, on_note)
        if jobs.info(connection, attempt.job) is None:
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


def _worker_log(run: RunDir, connection: Connection, rank: int, follow: bool, on_note: OnNote) -> Iterator[str]:
    """Return the lines of one worker and, with `follow`, of those that replace it, whose processes `on_note` gets."""
    worker = _worker_entry(run, rank)
    on_note(_describe_process(worker))
    # The generator `process_log` asks the cluster when its first line is read, here inside the caller's `try`.
    next(process_log(connection, worker["node"], worker["pid"], "out"), None)
    if not follow or recorded_outcome(events.read(run)):
        return _process_lines(connection, worker)
    return _lines_until_end(run, connection, worker, on_note)


def _process_lines(connection: Connection, worker: Mapping[str, Any], *, follow: bool = False) -> Iterator[str]:
    """Return a worker's stdout, which is mostly empty, then its stderr, which with `follow` never ends by itself."""
    log_address = connection, worker["node"], worker["pid"]
    return chain(process_log(*log_address, "out"), process_log(*log_address, "err", follow=follow))


def _describe_process(worker: Mapping[str, Any]) -> str:
    return f"rank {worker['rank']}: process {worker['pid']} on {worker['host']}"


def _worker_lines(lines: Iterator[str], pid: int) -> Iterator[str]:
    """Return the lines of a job's log that a worker wrote, without Ray's prefix that names the process."""
    prefix = re.compile(rf"^(\x1b\[[0-9;]*m)*\([^()]*\bpid={pid}\b[^()]*\)(\x1b\[[0-9;]*m)* ?")
    return (prefix.sub("", line) for line in lines if prefix.match(line))


def _started_workers(run: RunDir) -> dict[int, dict[str, Any]]:
    """Return the workers in the newest attempt's newest `started` event, by rank; empty before they start."""
    started_event = events.newest_event(events.of_newest_attempt(events.read(run)), "started")
    return {worker["rank"]: worker for worker in started_event["workers"]} if started_event else {}


def _worker_entry(run: RunDir, rank: int) -> dict[str, Any]:
    """Return the worker of a rank, as `_started_workers` does; a RunError says that there is none."""
    workers = _started_workers(run)
    if not workers:
        raise RunError(
            f"run {run.id}", "its workers have not started yet", f"see the log of its job: `mhmoe logs {run.id}`"
        )
    if rank not in workers:
        raise RunError(f"rank {rank} of run {run.id}", f"it has ranks 0 to {len(workers) - 1}", "name one of them")
    return workers[rank]


def _lines_until_end(run: RunDir, connection: Connection, worker: dict[str, Any], on_note: OnNote) -> Iterator[str]:
    """Yield the lines of a worker and of those that replace it, until the run has ended and no more lines arrive."""
    rank, retrying_caller, is_over = worker["rank"], RetryingCaller(on_note), False
    line_queue = _queue_lines(_process_lines(connection, worker, follow=True))

    def find_progress() -> tuple[dict[str, Any] | None, Outcome | None]:
        return _started_workers(run).get(rank), outcome(run, connection)

    while True:
        try:
            item = line_queue.get(timeout=OUTCOME_CHECK_SECONDS)
        except Empty:
            # With a call for each, every answer to one would restart the time limit, and the other's failure be lost.
            newest_worker, run_outcome = retrying_caller.call(find_progress, None) or (None, None)
            if newest_worker and any(newest_worker[key] != worker[key] for key in ("node", "pid")):
                worker, is_over = newest_worker, False
                on_note(_describe_process(worker))
                line_queue = _queue_lines(_process_lines(connection, worker, follow=True))
            # The last lines may arrive after the outcome is known, so one more interval must pass without a line.
            elif is_over:
                return
            else:
                is_over = run_outcome is not None
            continue
        if isinstance(item, (ClusterError, JobError)) and not isinstance(item, TokenError):
            # The log is lost if its node is gone. Another process may get this rank later.
            on_note(
                f"process {worker['pid']}: its log has ended early ({item.subject}: {item.reason}); still following"
            )
        elif isinstance(item, Exception):
            raise item
        else:
            yield item


def _queue_lines(lines: Iterator[str]) -> Queue[str | Exception]:
    """Return a queue that gets lines as they arrive and, if reading them fails, the exception."""
    line_queue = Queue[str | Exception]()

    def fill_queue() -> None:
        try:
            for line in lines:
                line_queue.put(line)
        except Exception as e:
            line_queue.put(e)

    # Ray follows a file forever, so a read may block forever. A daemon thread does not keep this process from ending.
    Thread(target=fill_queue, daemon=True).start()
    return line_queue
