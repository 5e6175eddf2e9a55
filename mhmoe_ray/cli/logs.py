"""`mhmoe logs`: the log lines of a run's job and its workers, filtered by time and by pattern."""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from itertools import chain
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli.common import STORAGE, JsonOption, RunArg, StorageOption, note, print_json, print_note

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.directory import RunDir


UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
TIMESTAMP_PATTERN = re.compile(r"\b(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d+))?([+-]\d\d:?\d\d|Z)?")
"""Pattern of a timestamp in a log line: our workers write it with an offset from UTC, Ray without."""


def parse_time(text: str) -> float:
    """Parse a point in time into seconds since the epoch: an age like 90s, 10m, 2h or 1d, or a date and time.

    Raises:
        BadParameter: the text is neither.
    """
    if match := re.fullmatch(r"(\d+)([smhd])", text):
        return time.time() - int(match[1]) * UNIT_SECONDS[match[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as e:
        raise typer.BadParameter(f"--since {text}: it is no time; write 90s, 10m, 2h, 1d or 2026-11-26T14:00") from e


def compile_pattern(text: str) -> re.Pattern[str]:
    """Compile a regular expression.

    Raises:
        BadParameter: the text is not a regular expression.
    """
    try:
        return re.compile(text)
    except re.error as e:
        raise typer.BadParameter(f"--grep {text}: it is no regular expression: {e}; escape signs like ( with \\") from e


def filter_lines(lines: Iterable[str], start_time: float | None, pattern: re.Pattern[str] | None) -> Iterator[str]:
    """Yield the lines that were written at `start_time` or later and match `pattern`.

    A line without a timestamp has the time of the nearest earlier line with one. Lines before the first timestamp have
    an unknown time and are left out if a start time is given.
    """
    # `is_recent` keeps its value for lines without a timestamp, because only the first line of a traceback or a table
    # has one.
    is_recent = start_time is None
    for line in lines:
        if start_time is not None and (timestamp := line_time(line)) is not None:
            is_recent = timestamp >= start_time
        if is_recent and (pattern is None or pattern.search(line)):
            yield line


def line_time(line: str) -> float | None:
    """Return the time in a line, in seconds since the epoch; None if there is none.

    A time without an offset counts as this machine's local time.
    """
    match = TIMESTAMP_PATTERN.search(line)
    if match is None:
        return None
    date, clock, fraction, offset = match.groups()
    try:
        timestamp = datetime.fromisoformat(f"{date}T{clock}{(offset or '').replace('Z', '+00:00')}")
        return (timestamp + timedelta(seconds=float(f"0.{fraction or 0}"))).timestamp()
    # A line may hold any text, so its digits may name a day or hour that does not exist, or a time that is too early or
    # too late to be converted.
    except (ValueError, OverflowError):
        return None


OUTCOME_CHECK_SECONDS = 2.0
"""Seconds without a line of the followed worker after which the command checks whether the run is over."""


def logs(
    run: RunArg = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Print only what the worker of this rank wrote.", show_default=False)
    ] = None,
    start_text: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Start at this time: 90s, 10m, 2h, 1d ago, or 2026-11-26T14:00."),
    ] = None,
    grep: Annotated[str | None, typer.Option(metavar="REGEX", help="Print only lines that match this.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines until the job ends, or Ctrl-C.")
    ] = False,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """Print the log of a run's newest attempt, with all workers, or of one worker by its rank.

    If the cluster is gone, the lines that the run directory keeps are printed.

    For example `mhmoe logs --rank 3 --since 10m --grep Error`.
    """
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.errors import ClusterError, JobError, TokenError
    from mhmoe_ray.runs.directory import find_run, last_attempt, newest_attempt_number
    from mhmoe_ray.runs.logs import archived_lines

    start_time, pattern = parse_time(start_text) if start_text else None, compile_pattern(grep) if grep else None
    run_dir = find_run(run, storage, with_job=True)
    attempt = last_attempt(run_dir)
    try:
        connection = connect(attempt.address)
        if rank is not None:
            lines: Iterator[str] = _worker_log(run_dir, connection, rank, follow)
        elif jobs.status(connection, attempt.job) is None:
            raise JobError(f"job {attempt.job}", "the cluster does not know it", "see `mhmoe list`")
        elif follow:
            lines = jobs.follow_logs(connection, attempt.job)
        else:
            lines = iter(jobs.logs(connection, attempt.job).splitlines())
    except (ClusterError, JobError) as e:
        stored_lines = archived_lines(run_dir, newest_attempt_number(run_dir))
        # A cluster that refuses the token still has the log. The error is raised, so that the user fixes the token.
        if isinstance(e, TokenError) or stored_lines is None:
            raise
        note.print(
            f"from {run_dir.logs}, because the cluster no longer has the lines ({e.subject}: {e.reason})",
            soft_wrap=True,
        )
        lines = stored_lines if rank is None else _worker_lines(stored_lines, _worker_entry(run_dir, rank)["pid"])
    if json or not sys.stdout.isatty():
        # Ray colours the prefixes of workers' lines even if the output cannot show colours, so the colour codes are
        # removed.
        lines = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines)
    selected_lines = filter_lines(lines, start_time, pattern)
    if json:
        print_json({"job": attempt.job, "rank": rank, "lines": list(selected_lines)})
        return
    try:
        for line in selected_lines:
            print(line, flush=follow)
    except KeyboardInterrupt:
        return


def _worker_log(run: "RunDir", connection: "Connection", rank: int, follow: bool) -> Iterator[str]:
    """Return the log of the worker of a rank: its stdout, which is mostly empty, and then its stderr with the log.

    Args:
        run: the run.
        connection: connection to the cluster that the run is or was on.
        rank: the rank.
        follow: whether to go on with new lines until the run ends.

    Raises:
        RunError: no workers have started yet, or there is no such rank.
        ClusterError, JobError: the cluster does not answer, or no longer has the log.
    """
    from mhmoe_ray.cluster.nodes import process_log
    from mhmoe_ray.cluster.runs import recorded_outcome
    from mhmoe_ray.runs import events

    worker = _worker_entry(run, rank)
    note.print(f"rank {rank}: process {worker['pid']} on {worker['host']}")
    log_address = connection, worker["node"], worker["pid"]
    printed_lines = process_log(*log_address, "out")
    # `process_log` is a generator: it asks the cluster only when its first line is read. The first line is read here,
    # so that the error of a missing log is raised inside the caller's `try`.
    first_line = next(printed_lines, None)
    printed_lines = chain([first_line] if first_line is not None else [], printed_lines)
    if not follow or recorded_outcome(events.read(run)):
        return chain(printed_lines, process_log(*log_address, "err"))
    return chain(printed_lines, _lines_until_end(process_log(*log_address, "err", follow=True), run, connection))


def _worker_lines(lines: Iterator[str], pid: int) -> Iterator[str]:
    """Return the lines of a job's log that a worker wrote, without Ray's prefix that names the process."""
    prefix = re.compile(rf"^(\x1b\[[0-9;]*m)*\([^()]*\bpid={pid}\b[^()]*\)(\x1b\[[0-9;]*m)* ?")
    return (prefix.sub("", line) for line in lines if prefix.match(line))


def _worker_entry(run: "RunDir", rank: int) -> dict[str, Any]:
    """Return the entry of a worker, by its rank, in the run's newest `started` event.

    Raises:
        RunError: no workers have started yet, or there is no such rank.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs import events

    started_event = events.newest_event(events.read(run), "started")
    if started_event is None:
        raise RunError(f"run {run.id}", "its workers have not started yet", "see `mhmoe logs` without --rank")
    worker = next((w for w in started_event["workers"] if w["rank"] == rank), None)
    if worker is None:
        reason = f"it has ranks 0 to {len(started_event['workers']) - 1}"
        raise RunError(f"rank {rank} of run {run.id}", reason, "name one of them")
    return dict(worker)


def _lines_until_end(lines: Iterator[str], run: "RunDir", connection: "Connection") -> Iterator[str]:
    """Yield the lines of a log that is followed without end, until the run has ended and no more lines arrive."""
    from mhmoe_ray.cluster.dashboard import RetryingCaller
    from mhmoe_ray.cluster.runs import outcome

    line_queue, retrying_caller, run_outcome = Queue[str | Exception | None](), RetryingCaller(print_note), None

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
