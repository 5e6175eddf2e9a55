"""Choosing among lines of a log by time and by what is in them."""

import re
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

import typer

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
STAMP = re.compile(r"\b(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d+))?([+-]\d\d:?\d\d|Z)?")
"""Of our workers, with their offset from UTC; of Ray, without."""


def moment(text: str) -> float:
    """Seconds since the epoch: 90s, 10m, 2h or 1d ago, or a date and time.

    Raises:
        BadParameter: it is neither.
    """
    if match := re.fullmatch(r"(\d+)([smhd])", text):
        return time.time() - int(match[1]) * UNITS[match[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as e:
        raise typer.BadParameter(f"--since {text}: it is no time; write 90s, 10m, 2h, 1d or 2026-11-26T14:00") from e


def pattern(text: str) -> re.Pattern[str]:
    """Raises:
    BadParameter: it is no regular expression.
    """
    try:
        return re.compile(text)
    except re.error as e:
        raise typer.BadParameter(f"--grep {text}: it is no regular expression: {e}; escape signs like ( with \\") from e


def chosen(lines: Iterable[str], since: float | None, wanted: re.Pattern[str] | None) -> Iterator[str]:
    """Lines from that time on that have what is wanted. One without a time belongs to the last one that has it; those
    before any, to nobody knows when, and are left out where a time is asked for."""
    late = since is None
    for line in lines:
        if since is not None and (when := stamped(line)) is not None:
            late = when >= since
        if late and (wanted is None or wanted.search(line)):
            yield line


def stamped(line: str) -> float | None:
    """The time in a line, in seconds since the epoch; without an offset it is taken for this machine's."""
    match = STAMP.search(line)
    if match is None:
        return None
    date, clock, fraction, offset = match.groups()
    try:
        found = datetime.fromisoformat(f"{date}T{clock}{(offset or '').replace('Z', '+00:00')}")
        return (found + timedelta(seconds=float(f"0.{fraction or 0}"))).timestamp()
    except (ValueError, OverflowError):  # no such day or hour, or at the ends of the calendar
        return None
