"""Helpers of commands: options and their completion, consoles, reading of specs and checkpoints, formats and tables.

After `mhmoe --install-completion`, the shell completes run ids and spec keys.
"""

import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mhmoe_ray.api.defaults import STORAGE as STORAGE
from mhmoe_ray.api.defaults import default_storage

if TYPE_CHECKING:
    from mhmoe_ray.checkpoint.manifest import CheckpointManifest
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.storage import Location


def complete_runs(incomplete: str) -> list[str]:
    """Return the ids of runs that start with `incomplete`, newest first, from the storage folder that commands use."""
    from mhmoe_ray.errors import MhmoeError
    from mhmoe_ray.runs.directory import list_runs

    try:
        run_ids = [run.id for run in list_runs(default_storage())]
    except MhmoeError:
        # A shell cannot show an error while it completes a word, so there are no suggestions instead.
        return []
    return [name for name in reversed(run_ids) if name.startswith(incomplete)]


def complete_keys(incomplete: str) -> list[str]:
    """Return the keys of a spec that start with `incomplete` as the option --set takes them, with =; shorthands
    first."""
    from mhmoe_ray.planner.resolve import Shorthands
    from mhmoe_ray.spec import RunSpec

    return [key for section in (Shorthands, RunSpec) for key in _section_keys(section) if key.startswith(incomplete)]


def _section_keys(model: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section and its subsections, such as `train.steps=`; `prefix` is the section's path
    with a dot."""
    for name, field in model.model_fields.items():
        subsection = _section_model(field.annotation)
        # A range has the keys `min` and `max`, but counts as a single key, because a spec may also write it as one
        # number.
        if subsection is not None and set(subsection.model_fields) != {"min", "max"}:
            yield from _section_keys(subsection, f"{prefix}{name}.")
        else:
            yield f"{prefix}{field.alias or name}="


def _section_model(annotation: Any) -> Any:
    """Return the pydantic model of a field that is a section with fixed keys; None for other fields, and for sections
    in a list or dictionary."""
    from types import NoneType, UnionType
    from typing import Union, get_args, get_origin

    from pydantic import BaseModel

    if get_origin(annotation) in (Union, UnionType):
        members = [a for a in get_args(annotation) if a is not NoneType]
        annotation = members[0] if len(members) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


# Markup and emoji are off, because paths and texts may hold brackets and colons that rich would interpret.
out = Console(highlight=False, markup=False, emoji=False)
"""Console for results, which writes to stdout."""
note = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""Console for progress and remarks. It writes to stderr, so that results can be piped."""

SpecArg = Annotated[Path, typer.Argument(help="A spec, for example jobs/quickstart.yaml.", show_default=False)]
RunArg = Annotated[
    str | None,
    typer.Argument(
        help="A run's id, the start of one, or its path; the newest by default.", autocompletion=complete_runs
    ),
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec.", autocompletion=complete_keys),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="A Ray cluster: its dashboard, http://host:8265, or its name. By default RAY_API_SERVER_ADDRESS, else "
        "RAY_ADDRESS where that is a URL, else the one of `mhmoe cluster use`, else one on this machine."
    ),
]
StorageOption = Annotated[
    str, typer.Option(help="Folder that holds run directories; a path or s3://, gs://.", envvar="MHMOE_STORAGE")
]
CheckpointOption = Annotated[
    str | None, typer.Option(help="Name or step of one of the run's checkpoints; newest by default.")
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Proceed even if a cluster does not answer that may still train or serve the run."),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-run", help="Use cluster.runtime_env, serve.host and serve.keys of a run that you did not submit."
    ),
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Do not follow the job; it goes on by itself.")]
BARS = "▁▂▃▄▅▆▇█"
"""Block characters for plots of one line, lowest first."""


def pick_checkpoint(run: "RunDir", name: str | None, *, verify_hashes: bool) -> "tuple[Location, CheckpointManifest]":
    """Call `api.checkpoints.pick_checkpoint`, and print its warnings."""
    from mhmoe_ray.api import checkpoints

    return checkpoints.pick_checkpoint(run, name, verify_hashes=verify_hashes, on_note=print_note)


@contextmanager
def detach_on_interrupt(hint: str) -> Iterator[None]:
    """Return a context in which Ctrl-C ends the command, which only follows a job or deployment, and prints `hint`."""
    try:
        yield
    except KeyboardInterrupt:
        note.print(f"\ndetached; {hint}", soft_wrap=True)
        raise typer.Exit from None


def print_note(line: str) -> None:
    """Print a line to stderr, apart from the results, without wrapping it."""
    note.print(line, soft_wrap=True)


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


def fact_table(rows: dict[str, str | None], title: str | None = None) -> Table:
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


def print_untruncated(table: Table) -> None:
    """Print a table without truncating its cells: lines wider than the terminal wrap."""
    # By default rich measures at most the width of the console, so a larger limit is given to get the table's full
    # width.
    table_width = out.measure(table, options=out.options.update(max_width=100_000)).maximum
    Console(file=out.file, width=max(out.width, table_width), highlight=False, markup=False, emoji=False).print(table)


def format_figure(value: float | None, format_spec: str) -> str:
    """Format a metric of a run; return "not finite" for None, which stands for NaN and infinity in metrics.jsonl."""
    return "not finite" if value is None else format(value, format_spec)


def format_nats(value: float | None) -> str:
    """Format a loss in nats with four decimals, as `format_figure` does."""
    return format_figure(value, ".4f")


def format_count(count: int, noun: str) -> str:
    """Format a number with its noun: "1 worker", "2 workers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: int) -> str:
    """Format a number of bytes with three significant digits and a decimal unit: 1.21 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        # From 999.5 on, a number rounds to 1000, which the format g with three digits writes as 1e+03. The next unit is
        # used instead.
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_digits(value: float) -> str:
    """Format a number with three significant digits, or as a whole number if it has more digits before the point."""
    # From 99.95 on, three significant digits leave no decimals, so the number is written as a whole number. The format
    # g would write an exponent from 1000 on.
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    """Format a duration with three significant digits in us, ms or s: 48.1 ms."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{format_digits(seconds * factor)} {unit}"
    return f"{format_digits(seconds)} s"
