"""`mhmoe logs`: what a run's job and its workers wrote."""

import re
import sys
from collections.abc import Iterator
from itertools import chain
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli.common import JsonOption, RunArg, StorageOption, note, print_json, say
from mhmoe_ray.cli.complete import STORAGE

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.directory import RunDir


LOOK_SECONDS = 2.0
"""Without a line of a worker that is followed, before each look whether its run is over."""


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

    For example `mhmoe logs --rank 3 --since 10m --grep Error`.
    """
    from mhmoe_ray.cli.log_lines import chosen, moment, pattern
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.runs.directory import find_run, last_attempt

    start, wanted = moment(since) if since else None, pattern(grep) if grep else None
    found = find_run(run, storage, with_job=True)
    attempt = last_attempt(found)
    connection = connect(attempt.address)
    if rank is not None:
        lines: Iterator[str] = _of_rank(found, connection, rank, follow)
    elif follow:
        lines = jobs.follow_logs(connection, attempt.job)
    else:
        lines = iter(jobs.logs(connection, attempt.job).splitlines())
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
    """What it prints goes to one file and what it logs to another; the first is mostly empty."""
    from mhmoe_ray.cluster.nodes import process_log
    from mhmoe_ray.cluster.runs import recorded_outcome
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs import events

    happened = events.events(run)
    started = events.newest(happened, "started")
    if started is None:
        raise RunError(f"run {run.id}", "its workers have not started yet", "see `mhmoe logs` without --rank")
    place = next((w for w in started["workers"] if w["rank"] == rank), None)
    if place is None:
        why = f"it has ranks 0 to {len(started['workers']) - 1}"
        raise RunError(f"rank {rank} of run {run.id}", why, "name one of them")
    note.print(f"rank {rank}: process {place['pid']} on {place['host']}")
    where = connection, place["node"], place["pid"]
    printed = process_log(*where, "out")
    if not follow or recorded_outcome(happened):
        return chain(printed, process_log(*where, "err"))
    return chain(printed, _until_over(process_log(*where, "err", follow=True), run, connection))


def _until_over(lines: Iterator[str], run: "RunDir", connection: "Connection") -> Iterator[str]:
    """Those that came before the run's end. Ray follows a file that nobody writes any more for ever, so they are waited
    for in a thread, which ends with the process."""
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
