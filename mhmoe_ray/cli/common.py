"""Helpers that commands share: options and their completion, consoles, reading specs and checkpoints, numbers and
tables.

After `mhmoe --install-completion` the shell completes ids of runs and keys of a spec.
"""

import json
import math
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mhmoe_ray.checkpoint.manifest import Manifest
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.spec import RunSpec
    from mhmoe_ray.storage import Location


STORAGE = "runs"


def runs(incomplete: str) -> list[str]:
    """Return the ids that complete an argument, newest first: those of runs in the storage folder that commands use."""
    from mhmoe_ray.errors import MhmoeError
    from mhmoe_ray.runs.directory import list_runs

    try:
        found = [run.id for run in list_runs(os.environ.get("MHMOE_STORAGE", STORAGE))]
    except MhmoeError:
        return []  # a shell that completes has no place for errors
    return [name for name in reversed(found) if name.startswith(incomplete)]


def keys(incomplete: str) -> list[str]:
    """Return the keys of a spec that complete an argument, as --set takes them, shorthands first."""
    from mhmoe_ray.planner.resolve import Shorthands
    from mhmoe_ray.spec import RunSpec

    return [key for section in (Shorthands, RunSpec) for key in _keys(section) if key.startswith(incomplete)]


def _keys(model: Any, before: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None and set(inner.model_fields) != {"min", "max"}:  # a range is written as a number too
            yield from _keys(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}="


def _model_in(annotation: Any) -> Any:
    """Return the pydantic model of a field that is a section, also of an optional one; None for any other field.

    Sections in a list or a table have no fixed keys and therefore count as other fields.
    """
    from types import NoneType, UnionType
    from typing import Union, get_args, get_origin

    from pydantic import BaseModel

    if get_origin(annotation) in (Union, UnionType):
        rest = [a for a in get_args(annotation) if a is not NoneType]
        annotation = rest[0] if len(rest) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


out = Console(highlight=False, markup=False, emoji=False)
"""Console for results."""
note = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""Console for progress and remarks, on stderr, so that results can be piped."""

SpecArg = Annotated[Path, typer.Argument(help="A spec, for example jobs/quickstart.yaml.", show_default=False)]
RunArg = Annotated[
    str | None,
    typer.Argument(help="A run's id, the start of one, or its path; the newest by default.", autocompletion=runs),
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec.", autocompletion=keys),
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
CheckpointOption = Annotated[str | None, typer.Option(help="Name of one of the run's checkpoints; newest by default.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Also if its cluster does not answer but it wrote a moment ago.")
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Do not follow; the job goes on by itself.")]
SPEC_SUFFIXES = (".yaml", ".yml")
"""Suffixes by which an argument is recognised as a spec, where it may also be something else."""
BARS = "▁▂▃▄▅▆▇█"


def read_spec(path: Path, overrides: list[str]) -> "RunSpec":
    """Read a spec and make its paths absolute, relative to the current directory."""
    from mhmoe_ray.planner.resolve import resolve_spec

    return resolve_spec(path, overrides).with_absolute_paths(Path.cwd())


def pick_checkpoint(run: "RunDir", name: str | None, *, hashed: bool) -> "tuple[Location, Manifest]":
    """Return the path and the manifest of a run's checkpoint: the named one, else the newest complete one.

    Args:
        run: the run.
        name: name of the checkpoint; None picks the newest.
        hashed: whether to read all of its weights and compare their hashes with the manifest. Otherwise only names and
            sizes of files are compared, and loading the checkpoint reveals other damage.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    from mhmoe_ray.checkpoint.manifest import newest_checkpoint, read_manifest
    from mhmoe_ray.errors import CheckpointError
    from mhmoe_ray.storage import describe_files

    weights, describe = ("weights",), describe_files if hashed else None
    if name:
        return run.checkpoints / name, read_manifest(run.checkpoints / name, weights, describe)
    newest = newest_checkpoint(run, weights, describe)
    if newest is None:
        raise CheckpointError(f"run {run.id}", "it has no checkpoint yet", "wait for one, or train a run")
    path, manifest, skipped = newest
    for error in skipped:
        note.print(f"warning: {error}", soft_wrap=True)
    return path, manifest


@contextmanager
def detaching(hint: str) -> Iterator[None]:
    """Within this context, Ctrl-C ends the command, which only follows something, and prints the hint on what goes
    on."""
    try:
        yield
    except KeyboardInterrupt:
        note.print(f"\ndetached; {hint}", soft_wrap=True)
        raise typer.Exit from None


def say(line: str) -> None:
    """Print a line to stderr, beside the results, without wrapping it."""
    note.print(line, soft_wrap=True)


def print_json(value: Any, indent: int | None = 1) -> None:
    """Print a value as JSON; a number that is not finite becomes null, because JSON cannot express it."""
    json.dump(_finite(value), sys.stdout, indent=indent, default=str)
    print(flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(rows: dict[str, str | None], title: str | None = None) -> Table:
    """Return a table of two columns, name and value; rows without a value are left out."""
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

    Args:
        columns: titles of the columns; the first column holds names if its title is empty.
        rows: cells, row by row.
        header: whether to show the titles.
        names: titles of other columns that hold names.
    """
    table = Table(show_header=header, box=None, pad_edge=False)
    for i, column in enumerate(columns):
        is_name = column in names or (i == 0 and not column)
        table.add_column(column, justify="left" if is_name else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def print_whole(table: Table) -> None:
    """Print a table without truncating a cell: a line wider than the terminal wraps around."""
    needed = out.measure(table, options=out.options.update(max_width=100_000)).maximum
    Console(file=out.file, width=max(out.width, needed), highlight=False, markup=False, emoji=False).print(table)


def figure(value: float | None, form: str) -> str:
    """Format a number of a run's history, in which null stands for a number that was not finite."""
    return "not finite" if value is None else format(value, form)


def nats(value: float | None) -> str:
    """Format a loss in nats with four decimals."""
    return figure(value, ".4f")


def in_bytes(count: int) -> str:
    """Format a number of bytes with three digits and a unit: 1.21 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def in_digits(value: float) -> str:
    """Format a number with three digits, or with all digits before the point if there are more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def in_seconds(seconds: float) -> str:
    """Format a duration with three digits and a unit: 48.1 ms."""
    for unit, in_one in (("us", 1e6), ("ms", 1e3)):
        if seconds * in_one < 999.5:
            return f"{in_digits(seconds * in_one)} {unit}"
    return f"{in_digits(seconds)} s"
