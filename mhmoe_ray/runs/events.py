"""Events of a run, in order.

The state of a run is a function of its events.
"""

import time
from typing import Any, Literal

from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec.cluster import ClusterSpec, mesh_in_words

Kind = Literal[
    "submitted",  # attempt, job, address
    "began",  # attempt, host, pid (of its job)
    "preparing",  # folder
    "prepared",  # validation_tokens, and the fields of data.shards.manifest.Baselines
    "waiting",  # missing (what the cluster lacks for the workers at the moment)
    "restoring",  # name (of the checkpoint that workers will start from; null without one), step, attempt
    "started",  # group, step, dp, ep, groups (ranks), straddling_groups and groups_apart (numbers of them),
    # dispatch, flat_groups (which hierarchical dispatch must leave flat), asked (cluster.workers),
    # workers: [{rank, pid, began (of that process), host, node}]
    "hung",  # rank, host, pid, step (its last), doing, seconds (without progress), silent (or waiting with others)
    "lost",  # rank, reason, host, lines (its last ones), ranks (number of those that failed with it)
    "checkpoint",  # step, name; pause (seconds that training waited for it), seconds (until it was committed)
    "preempted",  # step, nodes (ids), deadline (in seconds since the epoch, or null): the workers go elsewhere
    "skipped_checkpoint",  # name, reason
    "dropped_checkpoint",  # name
    "finished",  # step
    "stopped",  # step, or reason
    "failed",  # reason
    "served",  # application, url, address (of the cluster), checkpoint (its name)
    "imported",  # source, model_type, step, name (of the checkpoint)
]
State = Literal["submitted", "preparing", "waiting", "running", "finished", "stopped", "failed", "imported"]

_STATE_AFTER: dict[str, State] = {
    "submitted": "submitted",
    "began": "preparing",
    "preparing": "preparing",
    "waiting": "waiting",
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


def newest(happened: list[dict[str, Any]], kind: Kind) -> dict[str, Any] | None:
    """Return the last event of this kind; None if there is none."""
    return next((event for event in reversed(happened) if event["event"] == kind), None)


def state(happened: list[dict[str, Any]]) -> State:
    """Return the state of a run after these events."""
    current: State = "submitted"
    begun = 0
    for event in happened:
        kind = event["event"]
        if kind == "began":
            begun = event.get("attempt", 0)
        elif kind == "submitted" and event.get("attempt", begun + 1) <= begun:
            continue  # on an object store lines are in the order of their writers' clocks, which differ
        elif kind == "restoring" and current == "waiting":
            current = "preparing"
        current = _STATE_AFTER.get(kind, current)
    return current


def is_over(current: str) -> bool:
    """Return whether a run in this state has ended.

    A state that is not known has not.
    """
    return current in ("finished", "stopped", "failed", "imported")


def hung(event: dict[str, Any]) -> str:
    """Return a sentence about a rank that hung, from its "hung" event."""
    how = "gave no sign of life" if event["silent"] else "made no progress"
    where = f"rank {event['rank']} (process {event['pid']} on {event['host']})"
    return f"{where} {how} for {event['seconds']:.0f} s, {event['doing']} after step {event['step']}; it was ended"


def lost(event: dict[str, Any]) -> str:
    """Return a sentence about workers that failed, from their "lost" event."""
    more = event["ranks"] - 1
    others = f", and {more} other{'s' if more > 1 else ''} with it" if more else ""
    return f"rank {event['rank']} on {event['host'] or 'a node that is not known'} failed{others}: {event['reason']}"


def interruptions(happened: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """Return the time and the reason of each end of workers before their time, whether or not they were started again.

    Times are in seconds since the epoch, reasons are sentences. The failure of a rank that was killed because it hung
    is not listed a second time.
    """
    sentences = {"hung": hung, "preempted": preempted, "lost": lost}
    told: list[tuple[float, str]] = []
    hung_rank = None
    for event in happened:
        kind = event["event"]
        if kind == "lost" and event["rank"] == hung_rank:  # since it was ended for that
            hung_rank = None
        elif kind in sentences:
            told.append((event["time"], sentences[kind](event)))
            hung_rank = event["rank"] if kind == "hung" else hung_rank
        elif kind == "started":
            hung_rank = None
    return told


def workers(started: dict[str, Any]) -> str:
    """Return the number of workers of a "started" event, and the number that was asked for where that is a range."""
    asked = started.get("asked")  # events of before have none
    return str(len(started["workers"])) + (f" (of {asked['min']} to {asked['max']})" if isinstance(asked, dict) else "")


def mesh(started: dict[str, Any]) -> str:
    """Return the sizes of the mesh of a "started" event, in words."""
    return mesh_in_words({name: started[name] for name in ClusterSpec().mesh_sizes() if name in started})


def preempted(event: dict[str, Any]) -> str:
    """Return a sentence about the nodes that are preempted, from a "preempted" event."""
    left = f" within {event['deadline'] - event['time']:.0f} s" if event["deadline"] else ""
    nodes = ", ".join(node[:12] for node in event["nodes"])
    return f"node {nodes} is taken away{left}; saved at step {event['step']}, starting elsewhere or smaller"


def straddling(started: dict[str, Any]) -> str | None:
    """Return a sentence about the expert-parallel groups that lie on several nodes, from a "started" event; None
    without any."""
    if not (groups := started["straddling_groups"]):
        return None
    said = f"{groups} expert-parallel groups lie on more than one node"
    if apart := started.get("groups_apart"):  # events of before have none
        said += f", {apart} of them in more than one domain"
    if flat := started.get("flat_groups"):
        said += f"; {flat} with unequally many ranks on their nodes, so that dispatch stays flat there"
    return said
