"""`mhmoe list`: all runs of a storage folder."""

import time
from typing import Any

from rich.table import Table

from mhmoe_ray.cli.common import STORAGE, JsonOption, StorageOption, out, print_json


def list_(storage: StorageOption = STORAGE, json: JsonOption = False) -> None:
    """List runs, newest last, as their directories describe them."""
    from mhmoe_ray.runs import events, metrics
    from mhmoe_ray.runs.layout import list_runs

    found: list[dict[str, Any]] = []
    for run in list_runs(storage):
        happened, history = events.events(run), metrics.history(run)
        found.append(
            {
                "run": run.id,
                "state": events.state(happened),
                "step": history[-1][metrics.STEP] if history else 0,
                "steps": run.spec().train.steps,
                "loss": history[-1][metrics.LOSS] if history else None,
                "submitted": happened[0]["time"] if happened else None,
                "path": str(run.path),
            }
        )
    if json:
        print_json(found)
        return
    table = Table("run", "state", "step", "loss", "submitted", box=None, pad_edge=False)
    for row in found:
        loss = f"{row['loss']:.3f}" if row["loss"] is not None else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["submitted"])) if row["submitted"] else ""
        table.add_row(row["run"], row["state"], f"{row['step']}/{row['steps']}", loss, when)
    out.print(table if found else f"no runs in {storage}")
