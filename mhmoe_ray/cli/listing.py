"""`mhmoe list`: runs of a storage folder."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mhmoe_ray.cli.common import JsonOption, StorageOption, out, print_json
from mhmoe_ray.cli.complete import STORAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.directory import RunDir


def list_(
    name: Annotated[str | None, typer.Argument(help="Only runs whose ids begin so.", show_default=False)] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="Only runs in this state; may be given several times.", show_default=False)
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only runs made since: 90s, 10m, 2h, 1d ago, or 2026-11-26.")
    ] = None,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """List runs, newest last: as their directories describe them, and their clusters where they are not over.

    For example `mhmoe list tiny --state running --since 1d`.
    """
    from mhmoe_ray.cli.log_lines import moment
    from mhmoe_ray.cluster.connect import each_once
    from mhmoe_ray.runs.directory import list_runs

    start = moment(since) if since else 0.0
    wanted = [run for run in list_runs(storage) if run.id.startswith(name or "") and run.created() >= start]
    connected = each_once()
    found = [row for row in (_row(run, connected) for run in wanted) if not state or row["state"] in state]
    if json:
        print_json(found)
        return
    table = Table("run", "preset", "state", "step", "loss", "created", box=None, pad_edge=False)
    for row in found:
        loss = f"{row['loss']:.3f}" if row["loss"] is not None else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        step = f"{row['step']}/{row['steps']}" if row["steps"] is not None else ""
        table.add_row(row["run"], row["preset"] or "", row["state"], step, loss, when)
    fewer = " that are so" if name or state or since else ""
    out.print(table if found else f"no runs in {storage}{fewer}")


def _row(run: "RunDir", connected: "Callable[[str], Connection]") -> dict[str, Any]:
    from mhmoe_ray.cluster.runs import state_of
    from mhmoe_ray.errors import SpecError
    from mhmoe_ray.runs import events, metrics

    last = metrics.last(run)
    steps: int | str | None = None
    preset = None
    try:
        if not run.is_imported:
            spec = run.spec()
            steps, preset = spec.train.steps, spec.origin
        state, _, _ = state_of(run, events.events(run), connected)
    except SpecError:  # written by another version; the other runs are still worth a list
        steps, state = "?", "unreadable spec"
    return {
        "run": run.id,
        "state": state,
        "step": last[metrics.STEP] if last else 0,
        "steps": steps,
        "preset": preset,
        "loss": last[metrics.LOSS] if last else None,
        "created": run.created(),
        "path": str(run.path),
    }
