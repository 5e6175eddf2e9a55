"""Helpers with which commands print: consoles, the progress of jobs, tables and JSON."""

import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from mhmoe_ray.terminal import printable

if TYPE_CHECKING:
    from mhmoe_ray.cluster.remote import SubmittedJob


class SafeConsole(Console):
    """Console on which texts of others cannot control the terminal."""

    def __init__(self, **settings: Any) -> None:
        # Markup and emoji are off, because paths and texts may hold brackets and colons that rich would interpret.
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


out = SafeConsole()
"""Console for results, which writes to stdout."""
note = SafeConsole(stderr=True)
"""Console for progress and remarks. It writes to stderr, so that results can be piped."""


@contextmanager
def detach_on_interrupt(hint: str) -> Iterator[None]:
    """Return a context in which Ctrl-C ends the command, which only follows a job or deployment, and prints `hint`."""
    try:
        yield
    except KeyboardInterrupt:
        note.print(f"\ndetached; {hint}", soft_wrap=True)
        raise typer.Exit from None


def print_line(line: str) -> None:
    """Print a line of the result without wrapping it."""
    out.print(line, soft_wrap=True)


def print_note(line: str) -> None:
    """Print a line to stderr, apart from the results, without wrapping it."""
    note.print(line, soft_wrap=True)


def detach_from_job(job: "SubmittedJob[Any]", hint: str | None = None) -> AbstractContextManager[None]:
    """Return a context in which Ctrl-C ends the command; the job goes on, as `hint` or the dashboard shows."""
    hint = hint or f"see it in the dashboard, {job.connection.address}"
    return detach_on_interrupt(f"job {job.name} goes on; {hint}")


def follow_job(job: "SubmittedJob[Any]", hint: str | None = None) -> None:
    """Print the lines that a job writes for the user, until the job ends or the user presses Ctrl-C."""
    with detach_from_job(job, hint):
        for line in job.progress():
            print_note(line)


def print_json(value: Any, indent: int | None = 1) -> None:
    """Print a value as JSON, with null for each number that is not finite: JSON cannot express such a number."""
    json.dump(_replace_nonfinite(value), sys.stdout, indent=indent, default=str)
    print(flush=True)


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fact_table(rows: Mapping[str, str | None], title: str | None = None) -> Table:
    """Return a table of two columns, name and value; leave out rows without a value."""
    table = Table(show_header=False, box=None, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def number_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], header: bool = True, names: Collection[str] = ()
) -> Table:
    """Return a table with names aligned to the left and numbers aligned to the right.

    Names are in the columns with a title in `names`, and in the first column if it has no title.
    """
    table = Table(show_header=header, box=None, pad_edge=False)
    for i, column in enumerate(columns):
        is_name = column in names or (i == 0 and not column)
        table.add_column(column, justify="left" if is_name else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], names: Collection[str] = ()) -> None:
    """Print a table as `number_table` returns it, without truncating its cells."""
    print_untruncated(number_table(columns, rows, names=names))


def print_untruncated(table: Table) -> None:
    """Print a table without truncating its cells: lines wider than the terminal wrap."""
    # Rich measures at most the width of the console, unless a larger limit is given.
    table_width = out.measure(table, options=out.options.update(max_width=100_000)).maximum
    SafeConsole(file=out.file, width=max(out.width, table_width)).print(table)
