"""Helpers with which commands print: consoles, lines about the present activity, tables and JSON."""

import json
import math
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, Task
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mhmoe_ray.terminal import Activity, printable

if TYPE_CHECKING:
    from mhmoe_ray.cluster.remote import SubmittedJob

LINE_SECONDS = 10.0
"""Seconds between two lines about the same activity if the output is not a terminal, on which one line is redrawn."""


class SafeConsole(Console):
    """Console on which texts of others cannot control the terminal."""

    def __init__(self, **settings: Any) -> None:
        # Markup and emoji are off, because paths and texts may hold brackets and colons that rich would interpret.
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def print(self, *objects: Any, **settings: Any) -> None:
        # Results may go to the same terminal as the lines of activities, and would be mixed with them.
        if not self.stderr:
            activity_lines.end()
        super().print(*objects, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


out = SafeConsole()
"""Console for results, which writes to stdout."""
note = SafeConsole(stderr=True)
"""Console for progress and remarks. It writes to stderr, so that results can be piped."""


class ActivityLines(Progress):
    """Lines at the bottom of a terminal about what the command does now, until it prints a result or ends.

    A thread redraws them, so their clocks go on while modules are imported or a server does not answer.
    """

    def __init__(self) -> None:
        # Without `redirect_stdout`, rich would write to stderr what the command writes to stdout.
        super().__init__(console=note, refresh_per_second=4, transient=True, redirect_stdout=False)
        self._spinner, self._shown_tasks = Spinner("dots"), dict[str, Task]()
        self._printed_activity, self._print_time = "", 0.0

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            start = f"{self._spinner.render(task.get_time())} {_clock(task.elapsed or 0)} "
            yield Text(start + _describe(task), no_wrap=True, overflow="ellipsis")

    def show(self, activity: Activity, name: str = "") -> Task:
        """Show an activity on a terminal, in place of the one with this name; the same one with new figures goes on."""
        task = self._shown_tasks.get(name)
        if task is None or (task.description, task.total) != (activity.text, activity.total_count):
            self.hide(name)
            self.add_task(activity.text, total=activity.total_count, completed=activity.done_count, activity=activity)
            task = self._shown_tasks[name] = self.tasks[-1]
        self.update(task.id, completed=activity.done_count, activity=activity)
        if note.is_interactive:
            self.start()
        return task

    def hide(self, name: str = "") -> None:
        """Remove the line of the activity with this name, if there is one."""
        if task := self._shown_tasks.pop(name, None):
            self.remove_task(task.id)

    def report(self, activity: Activity) -> None:
        """Show an activity; where there is no terminal, print its details if they have changed, from time to time."""
        task = self.show(activity)
        if note.is_interactive or not activity.details or activity == self._printed_activity:
            return
        words, printed_words = (re.sub(r"[\d.,:]+", "", text) for text in (activity, self._printed_activity))
        is_late = time.monotonic() - self._print_time > LINE_SECONDS
        if words != printed_words or is_late or activity.done_count == activity.total_count:
            self._printed_activity, self._print_time = activity, time.monotonic()
            note.print(_describe(task), soft_wrap=True)

    def end(self) -> None:
        """Remove all lines, and leave the terminal as it was."""
        for name in list(self._shown_tasks):
            self.hide(name)
        if self.live.is_started:
            self.stop()


def _describe(task: Task) -> str:
    """Return an activity with the time that remains, if it can be estimated."""
    remaining = f", {_clock(task.time_remaining)} left" if task.time_remaining else ""
    return f"{task.fields['activity']}{remaining}"


def _clock(seconds: float) -> str:
    return "{}:{:02}".format(*divmod(int(seconds), 60))


activity_lines = ActivityLines()


def show_activity(text: str) -> None:
    """Show on a terminal what the command does now, in the present tense, until it does or prints something else."""
    activity_lines.show(Activity(text))


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
    """Print a line to stderr, apart from the results, without wrapping it, or report an activity."""
    if isinstance(line, Activity):
        activity_lines.report(line)
    else:
        note.print(line, soft_wrap=True)


def detach_from_job(job: "SubmittedJob[Any]", hint: str | None = None) -> AbstractContextManager[None]:
    """Return a context in which Ctrl-C ends the command; the job goes on, as `hint` or the dashboard shows."""
    hint = hint or f"see it in the dashboard, {job.connection.address}"
    return detach_on_interrupt(f"job {job.name} goes on; {hint}")


def follow_job(job: "SubmittedJob[Any]", hint: str | None = None) -> None:
    """Show what a job writes for the user, until the job ends or the user presses Ctrl-C."""
    show_activity("waiting for the job to start")
    with detach_from_job(job, hint):
        for line in job.progress():
            counts = re.search(r"([\d,]+) of ([\d,]+)", line)
            kind, _, details = line.partition(" ")
            print_note(Activity(kind, details, *(int(n.replace(",", "")) for n in counts.groups()) if counts else ()))
    show_activity("reading the result of the job")


def print_json(value: Any, indent: int | None = 1) -> None:
    """Print a value as JSON, with null for each number that is not finite: JSON cannot express such a number."""
    activity_lines.end()
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
