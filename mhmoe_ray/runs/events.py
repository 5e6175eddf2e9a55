"""What happened to a run, in order. The state of a run is a function of these lines."""

import time
from typing import Any, Literal

from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.layout import RunDir

Kind = Literal[
    "submitted",  # attempt, job, address
    "preparing",  # folder
    "prepared",  # validation_tokens, and the fields of data.manifest.Baselines
    "started",  # group, step, dp, ep, groups (ranks), straddling_groups and groups_apart (numbers of them),
    # dispatch, flat_groups (which hierarchical dispatch must leave flat), workers: [{rank, pid, host, node}]
    "checkpoint",  # step, name
    "skipped_checkpoint",  # name, reason
    "dropped_checkpoint",  # name
    "finished",  # step
    "stopped",  # step, or reason
    "failed",  # reason
    "imported",  # source, model_type, step, name (of the checkpoint)
]
State = Literal["submitted", "preparing", "running", "finished", "stopped", "failed", "imported"]

_STATE_AFTER: dict[str, State] = {
    "submitted": "submitted",
    "preparing": "preparing",
    "started": "running",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "imported": "imported",
}


def record(run: RunDir, kind: Kind, **fields: Any) -> None:
    jsonl.append(run.events_file, {"time": time.time(), "event": kind, **fields})


def events(run: RunDir) -> list[dict[str, Any]]:
    return list(jsonl.read(run.events_file))


def state(happened: list[dict[str, Any]]) -> State:
    """The state after these events."""
    current: State = "submitted"
    for event in happened:
        current = _STATE_AFTER.get(event["event"], current)
    return current


def is_over(current: State) -> bool:
    return current in ("finished", "stopped", "failed", "imported")


def straddling(started: dict[str, Any]) -> str | None:
    """A sentence on the expert-parallel groups that lie on several nodes, by a "started" event; None without any."""
    if not (groups := started["straddling_groups"]):
        return None
    said = f"{groups} expert-parallel groups lie on more than one node"
    if apart := started.get("groups_apart"):  # events of before have none
        said += f", {apart} of them in more than one domain"
    if flat := started.get("flat_groups"):
        said += f"; {flat} with unequally many ranks on their nodes, so that dispatch stays flat there"
    return said
