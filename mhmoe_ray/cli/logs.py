"""`mhmoe logs`: the log lines of a run's job and its workers, filtered by time and by pattern."""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Annotated

import typer

from mhmoe_ray.cli import options
from mhmoe_ray.cli.output import print_json, print_note

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
TIMESTAMP_PATTERN = re.compile(r"\b(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d+))?([+-]\d\d:?\d\d|Z)?")
"""Pattern of a timestamp in a log line. Our workers write an offset from UTC after the time, and Ray writes none."""


def parse_time(text: str) -> float:
    """Parse an age like 90s, 10m, 2h or 1d, or a date and time, into seconds since the epoch."""
    if match := re.fullmatch(r"(\d+)([smhd])", text):
        return time.time() - int(match[1]) * UNIT_SECONDS[match[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as e:
        raise typer.BadParameter(f"--since {text}: it is no time; write 90s, 10m, 2h, 1d or 2026-11-26T14:00") from e


def compile_pattern(text: str) -> re.Pattern[str]:
    """Compile the regular expression that the option --grep gives."""
    try:
        return re.compile(text)
    except re.error as e:
        raise typer.BadParameter(f"--grep {text}: it is no regular expression: {e}; escape signs like ( with \\") from e


def filter_lines(lines: Iterable[str], start_time: float | None, pattern: re.Pattern[str] | None) -> Iterator[str]:
    """Yield the lines that were written at `start_time` or later and match `pattern`.

    A line without a timestamp has the time of the nearest earlier line with one. Lines before the first timestamp are
    left out if a start time is given.
    """
    # Only the first line of a traceback or a table has a timestamp, so the value stays for lines without one.
    is_recent = start_time is None
    for line in lines:
        if start_time is not None and (timestamp := line_time(line)) is not None:
            is_recent = timestamp >= start_time
        if is_recent and (pattern is None or pattern.search(line)):
            yield line


def line_time(line: str) -> float | None:
    """Return the timestamp in a log line in seconds since the epoch, or None; it is local without an offset."""
    match = TIMESTAMP_PATTERN.search(line)
    if match is None:
        return None
    date, clock, fraction, offset = match.groups()
    try:
        timestamp = datetime.fromisoformat(f"{date}T{clock}{(offset or '').replace('Z', '+00:00')}")
        return (timestamp + timedelta(seconds=float(f"0.{fraction or 0}"))).timestamp()
    # The digits may name a day or hour that does not exist, or a time too early or too late to be converted.
    except (ValueError, OverflowError):
        return None


def logs(
    run: options.RunArg = None,
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
    storage: options.StorageOption = options.STORAGE,
    json: options.JsonOption = False,
) -> None:
    """Print the log of a run's newest attempt: that of the whole job, or that of the worker with a given rank.

    If the cluster is gone, the lines that the run directory keeps are printed.

    For example `mhmoe logs --rank 3 --since 10m --grep Error`.
    """
    from mhmoe_ray.api.logs import log_lines
    from mhmoe_ray.runs.directory import find_run, last_attempt
    from mhmoe_ray.terminal import printable_colours, without_colours

    start_time, pattern = parse_time(start_text) if start_text else None, compile_pattern(grep) if grep else None
    run_dir = find_run(run, storage, with_job=True)
    job = last_attempt(run_dir).job
    lines = log_lines(run_dir, rank, follow=follow, on_note=print_note)
    # Without a terminal the output cannot show colours. With one, colours are the only codes that reach it.
    lines = map(without_colours if json or not sys.stdout.isatty() else printable_colours, lines)
    selected_lines = filter_lines(lines, start_time, pattern)
    if json:
        print_json({"job": job, "rank": rank, "lines": list(selected_lines)})
        return
    try:
        for line in selected_lines:
            print(line, flush=follow)
    except KeyboardInterrupt:
        return
