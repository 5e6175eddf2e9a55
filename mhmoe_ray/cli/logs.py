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

from mhmoe_ray.cli.common import STORAGE, JsonOption, RunArg, StorageOption, note, print_json, say

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.directory import RunDir


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
STAMP = re.compile(r"\b(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d+))?([+-]\d\d:?\d\d|Z)?")
"""Timestamp in a log line: our workers write it with an offset from UTC, Ray without."""


def moment(text: str) -> float:
    """Return a point in time in seconds since the epoch: 90s, 10m, 2h or 1d ago, or a date and time.

    Raises:
        BadParameter: the text is neither.
    """
    if match := re.fullmatch(r"(\d+)([smhd])", text):
        return time.time() - int(match[1]) * UNITS[match[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as e:
        raise typer.BadParameter(f"--since {text}: it is no time; write 90s, 10m, 2h, 1d or 2026-11-26T14:00") from e


def pattern(text: str) -> re.Pattern[str]:
    """Compile a regular expression.

    Raises:
        BadParameter: the text is not a regular expression.
    """
    try:
        return re.compile(text)
    except re.error as e:
        raise typer.BadParameter(f"--grep {text}: it is no regular expression: {e}; escape signs like ( with \\") from e


def chosen(lines: Iterable[str], since: float | None, wanted: re.Pattern[str] | None) -> Iterator[str]:
    """Yield the lines from the time `since` on that match `wanted`.

    A line without a timestamp belongs to the last line that has one. Lines before the first timestamp have an unknown
    time; they are left out if `since` is given.
    """
    late = since is None
    for line in lines:
        if since is not None and (when := stamped(line)) is not None:
            late = when >= since
        if late and (wanted is None or wanted.search(line)):
            yield line


def stamped(line: str) -> float | None:
    """Return the time in a line, in seconds since the epoch; None if there is none.

    A time without an offset counts as this machine's local time.
    """
    match = STAMP.search(line)
    if match is None:
        return None
    date, clock, fraction, offset = match.groups()
    try:
        found = datetime.fromisoformat(f"{date}T{clock}{(offset or '').replace('Z', '+00:00')}")
        return (found + timedelta(seconds=float(f"0.{fraction or 0}"))).timestamp()
    except (ValueError, OverflowError):  # no such day or hour, or at the ends of the calendar
        return None


LOOK_SECONDS = 2.0
"""Seconds without a line of the followed worker, after which the command checks whether the run is over."""


def logs(
    run: RunArg = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Only what this worker's process wrote.", show_default=False)
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="From then on: 90s, 10m, 2h, 1d ago, or 2026-11-26T14:00.")
    ] = None,
    grep: Annotated[str | None, typer.Option(metavar="REGEX", help="Only lines with this.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until the job ends, or Ctrl-C.")
    ] = False,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """Print the log of a run's newest attempt, workers included; or of one worker, by its rank.

    If the cluster is gone, the lines that the run directory keeps are printed.

    For example `mhmoe logs --rank 3 --since 10m --grep Error`.
    """
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.errors import ClusterError, JobError, TokenError
    from mhmoe_ray.runs.directory import find_run, last_attempt, newest_number
    from mhmoe_ray.runs.logs import kept_lines

    start, wanted = moment(since) if since else None, pattern(grep) if grep else None
    found = find_run(run, storage, with_job=True)
    attempt = last_attempt(found)
    try:
        connection = connect(attempt.address)
        if rank is not None:
            lines: Iterator[str] = _of_rank(found, connection, rank, follow)
        elif jobs.status(connection, attempt.job) is None:
            raise JobError(f"job {attempt.job}", "the cluster does not know it", "see `mhmoe list`")
        elif follow:
            lines = jobs.follow_logs(connection, attempt.job)
        else:
            lines = iter(jobs.logs(connection, attempt.job).splitlines())
    except (ClusterError, JobError) as e:
        kept = kept_lines(found, newest_number(found))
        if isinstance(e, TokenError) or kept is None:
            raise
        note.print(f"from {found.logs}, since the cluster has them no longer ({e.what}: {e.why})", soft_wrap=True)
        lines = kept if rank is None else _of_worker(kept, _worker(found, rank)["pid"])
    if json or not sys.stdout.isatty():
        lines = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines)  # Ray's colours
    shown = chosen(lines, start, wanted)
    if json:
        print_json({"job": attempt.job, "rank": rank, "lines": list(shown)})
        return
    try:
        for line in shown:
            print(line, flush=follow)
    except KeyboardInterrupt:
        return


def _of_rank(run: "RunDir", connection: "Connection", rank: int, follow: bool) -> Iterator[str]:
    """Return the log of a worker: first the file of what it printed, which is mostly empty, then the file of what it
    logged."""
    from mhmoe_ray.cluster.nodes import process_log
    from mhmoe_ray.cluster.runs import recorded_outcome
    from mhmoe_ray.runs import events

    place = _worker(run, rank)
    note.print(f"rank {rank}: process {place['pid']} on {place['host']}")
    where = connection, place["node"], place["pid"]
    printed = process_log(*where, "out")
    first = next(printed, None)  # asks now whether there is such a log
    printed = chain([first] if first is not None else [], printed)
    if not follow or recorded_outcome(events.events(run)):
        return chain(printed, process_log(*where, "err"))
    return chain(printed, _until_over(process_log(*where, "err", follow=True), run, connection))


def _of_worker(lines: Iterator[str], pid: int) -> Iterator[str]:
    """Return the lines of a job's log that a worker wrote, without Ray's prefix that names the process."""
    mark = re.compile(rf"^(\x1b\[[0-9;]*m)*\([^()]*\bpid={pid}\b[^()]*\)(\x1b\[[0-9;]*m)* ?")
    return (mark.sub("", line) for line in lines if mark.match(line))


def _worker(run: "RunDir", rank: int) -> dict[str, Any]:
    """Return the entry of a rank in the newest event of started workers.

    Raises:
        RunError: no workers have started yet, or there is no such rank.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs import events

    started = events.newest(events.events(run), "started")
    if started is None:
        raise RunError(f"run {run.id}", "its workers have not started yet", "see `mhmoe logs` without --rank")
    place = next((w for w in started["workers"] if w["rank"] == rank), None)
    if place is None:
        why = f"it has ranks 0 to {len(started['workers']) - 1}"
        raise RunError(f"rank {rank} of run {run.id}", why, "name one of them")
    return dict(place)


def _until_over(lines: Iterator[str], run: "RunDir", connection: "Connection") -> Iterator[str]:
    """Yield the lines that come before the run's end.

    Ray follows a file forever, even if no process writes to it any more. Lines are therefore read in a thread, which
    ends with the process.
    """
    from mhmoe_ray.cluster.dashboard import Patience
    from mhmoe_ray.cluster.runs import outcome

    told, patience, over = Queue[str | Exception | None](), Patience(say), None

    def read() -> None:
        try:
            for line in lines:
                told.put(line)
            told.put(None)
        except Exception as e:
            told.put(e)

    Thread(target=read, daemon=True).start()
    while True:
        try:
            found = told.get(timeout=LOOK_SECONDS)
        except Empty:
            if over:
                return
            over = patience.ask(lambda: outcome(run, connection), None)
            continue
        if found is None:
            return
        if isinstance(found, Exception):
            raise found
        yield found
