"""`mhmoe list`: all runs of a storage folder."""

import time
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mhmoe_ray.cli.common import STORAGE, JsonOption, StorageOption, out, print_json

if TYPE_CHECKING:
    from mhmoe_ray.runs.layout import RunDir


def list_(storage: StorageOption = STORAGE, json: JsonOption = False) -> None:
    """List runs, newest last, as their directories describe them."""
    from mhmoe_ray.runs.layout import list_runs

    found = [_row(run) for run in list_runs(storage)]
    if json:
        print_json(found)
        return
    table = Table("run", "preset", "state", "step", "loss", "created", box=None, pad_edge=False)
    for row in found:
        loss = f"{row['loss']:.3f}" if row["loss"] is not None else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        step = f"{row['step']}/{row['steps']}" if row["steps"] is not None else ""
        table.add_row(row["run"], row["preset"] or "", row["state"], step, loss, when)
    out.print(table if found else f"no runs in {storage}")


def _row(run: "RunDir") -> dict[str, Any]:
    from mhmoe_ray.errors import SpecError
    from mhmoe_ray.runs import events, metrics

    last = metrics.last(run)
    steps: int | str | None = None
    preset = None
    try:
        if not run.is_imported:
            spec = run.spec()
            steps, preset = spec.train.steps, spec.origin
        state: str = events.state(events.events(run))
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
