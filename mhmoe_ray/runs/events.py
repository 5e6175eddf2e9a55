"""Events of a run in its events.jsonl; the state of a run, which follows from them; and sentences about events."""

import time
from collections.abc import Callable
from typing import Any, Literal

from mhmoe_ray.errors import StorageError
from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec.cluster import ClusterSpec, format_mesh

EventKind = Literal[
    # The comment at each kind of event names the fields of its events.
    "submitted",  # attempt, job, address
    "began",  # attempt, host, pid (of the process of the attempt's job)
    "preparing",  # folder (of the prepared data)
    "prepared",  # validation_tokens, and the fields of data.shards.manifest.Baselines
    # Fields of "initialized" events: how (key of the spec's section `start`), sources (descriptions of the models that
    # the run starts from), step (0), name (of the checkpoint).
    "initialized",
    "waiting",  # missing (text that names the resources which the cluster lacks for the workers)
    "restoring",  # name (of the checkpoint that the workers start from; null if they start anew), step, attempt
    # Fields of "started" events: group (number of the worker group), step, dp and ep (sizes of the mesh), groups (ranks
    # of each expert-parallel group), straddling_groups (number of groups on several nodes), groups_apart (number of
    # groups in several network domains), dispatch (flat or hierarchical), flat_groups (number of groups that
    # hierarchical dispatch leaves flat), asked (the spec's cluster.workers), and workers: [{rank, pid, began and
    # start_ticks (start time of the process), host, node}].
    "started",
    # Fields of "hung" events: rank, host, pid, step (the last one), doing (phase, such as training), seconds (since the
    # last heartbeat or progress), silent (true if heartbeats were missing).
    "hung",
    "lost",  # rank, reason, host, lines (last lines of the rank's log), ranks (number of all failed ranks)
    "checkpoint",  # step, name, pause (seconds that training waited), seconds (until it was committed)
    "preempted",  # step, nodes (ids of the preempted nodes), deadline (in seconds since the epoch, or null)
    "adapted",  # step, task, top_k (the new number of experts that the task of a vision model chooses)
    "skipped_checkpoint",  # name, reason
    "dropped_checkpoint",  # name
    "finished",  # step
    "stopped",  # step if the workers ended as requested, reason if the job was ended
    "failed",  # reason
    "served",  # application, url, address (of the cluster), checkpoint (its name)
    "answering",  # output (folder of a batch inference), checkpoint (name of the one that answers)
    "answered",  # output (folder of a batch inference whose rows are all answered)
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


def record(run: RunDir, kind: EventKind, **fields: Any) -> None:
    """Append an event with the current time to events.jsonl; a failed write is a StorageError."""
    jsonl.append(run.events_file, {"time": time.time(), "event": kind, **fields})


def record_use(run: RunDir, kind: EventKind, on_note: Callable[[str], object], **fields: Any) -> None:
    """Record the use of a checkpoint; `on_note` gets a warning if the run, which stays usable, cannot be written."""
    try:
        record(run, kind, **fields)
    except StorageError as e:
        on_note(f"warning: {e}")


def read(run: RunDir) -> list[dict[str, Any]]:
    """Return all events of a run, oldest first."""
    return list(jsonl.read(run.events_file))


def has_weights(run: RunDir) -> bool:
    """Return whether a run has done a step or has weights to start from, so that its spec must not change."""
    return bool(jsonl.parts_with_sizes(run.metrics_file)) or newest_event(read(run), "initialized") is not None


def newest_event(run_events: list[dict[str, Any]], kind: EventKind) -> dict[str, Any] | None:
    """Return the newest event of this kind; None if there is none."""
    return next((event for event in reversed(run_events) if event["event"] == kind), None)


def of_newest_attempt(run_events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events since the newest attempt was submitted, oldest first; without a submission, all events."""
    submission = newest_event(run_events, "submitted")
    if submission is None:
        return run_events
    # On an object store, "began" may come before the "submitted" event of the same attempt (see `state`).
    first_index = next(
        index
        for index, event in enumerate(run_events)
        if event is submission or (event["event"] == "began" and event.get("attempt", 0) == submission.get("attempt"))
    )
    return run_events[first_index:]


def newest_group_event(run_events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the newest event about a job's start or a worker group's start or end; an empty dict if there is none."""
    event_kinds = ("began", "restoring", "started", "lost", "preempted")
    return next((event for event in reversed(run_events) if event["event"] in event_kinds), {})


def last_loss(run_events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the newest attempt's last "lost" event; None if no workers failed, or if they were restarted since."""
    event = newest_group_event(of_newest_attempt(run_events))
    return event if event.get("event") == "lost" else None


def deployments(run_events: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the newest "served" event of each application, by the cluster's address and the application's name."""
    return {(event["address"], event["application"]): event for event in run_events if event["event"] == "served"}


def checkpoints_in_use(run_events: list[dict[str, Any]]) -> set[str]:
    """Return the names of the checkpoints that applications and batch inferences use.

    An application uses the checkpoint that it served last, whether or not it still runs. A batch inference uses its
    checkpoint until all rows are answered, because the command that continues it needs the same one.
    """
    checkpoint_by_output: dict[str, str] = {}
    for event in run_events:
        if event["event"] == "answering":
            checkpoint_by_output[event["output"]] = event["checkpoint"]
        elif event["event"] == "answered":
            checkpoint_by_output.pop(event["output"], None)
    return {event["checkpoint"] for event in deployments(run_events).values()} | {*checkpoint_by_output.values()}


def state(run_events: list[dict[str, Any]]) -> State:
    """Return the state of a run, as its events determine it."""
    current: State = "submitted"
    begun_attempt = 0
    for event in run_events:
        kind = event["event"]
        if kind == "began":
            begun_attempt = event.get("attempt", 0)
        elif kind == "submitted" and event.get("attempt", begun_attempt + 1) <= begun_attempt:
            # On an object store, lines are in the order of their writers' clocks, which differ. So a "submitted" event
            # may come after the "began" event of the same attempt, and must not set the state back.
            continue
        elif kind == "restoring" and current == "waiting":
            current = "preparing"
        current = _STATE_AFTER.get(kind, current)
    return current


def is_end_state(current: str) -> bool:
    """Return whether a run in the state `current` has ended; False for an unknown state."""
    return current in ("finished", "stopped", "failed", "imported")


def describe_hang(event: dict[str, Any]) -> str:
    """Return a sentence about a rank that hung, from its "hung" event."""
    symptom = "sent no heartbeat" if event["silent"] else "made no progress"
    process = f"rank {event['rank']} (process {event['pid']} on {event['host']})"
    return (
        f"{process} {symptom} for {event['seconds']:.0f} s, {event['doing']} after step {event['step']}; it was killed"
    )


def describe_failure(event: dict[str, Any]) -> str:
    """Return a sentence about workers that failed, from their "lost" event."""
    other_count = event["ranks"] - 1
    others_text = f", and {other_count} other{'s' if other_count > 1 else ''} with it" if other_count else ""
    return (
        f"rank {event['rank']} on {event['host'] or 'a node that is not known'} failed{others_text}: {event['reason']}"
    )


def interruptions(run_events: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """Return each hang, preemption and failure of a run's workers: time in seconds since the epoch, and a sentence.

    A rank that was killed because it hung is listed once, although it also failed.
    """
    sentences = {"hung": describe_hang, "preempted": describe_preemption, "lost": describe_failure}
    sentences_by_time: list[tuple[float, str]] = []
    hung_ranks = set[int]()
    for event in run_events:
        kind = event["event"]
        if kind == "lost" and event["rank"] in hung_ranks:
            # The watchdog killed this rank because it hung. The list already has its "hung" event, so "lost" is left
            # out.
            hung_ranks.clear()
        elif kind in sentences:
            sentences_by_time.append((event["time"], sentences[kind](event)))
            if kind == "hung":
                hung_ranks.add(event["rank"])
        elif kind == "started":
            hung_ranks.clear()
    return sentences_by_time


def describe_workers(start_event: dict[str, Any]) -> str:
    """Return the number of workers of a "started" event as text, with the range of an elastic run."""
    # Events of older versions of this project lack the field `asked`, so the value may be None.
    requested = start_event.get("asked")
    return str(len(start_event["workers"])) + (
        f" (of {requested['min']} to {requested['max']})" if isinstance(requested, dict) else ""
    )


def describe_mesh(start_event: dict[str, Any]) -> str:
    """Return the sizes of a "started" event's mesh dimensions as text, such as `dp 2 x ep 4`."""
    return format_mesh({name: start_event[name] for name in ClusterSpec().mesh_sizes() if name in start_event})


def describe_preemption(event: dict[str, Any]) -> str:
    """Return a sentence about preempted nodes, from a "preempted" event."""
    deadline_text = f" within {event['deadline'] - event['time']:.0f} s" if event["deadline"] else ""
    nodes = ", ".join(node[:12] for node in event["nodes"])
    subject = f"node {nodes} is" if len(event["nodes"]) == 1 else f"nodes {nodes} are"
    return (
        f"{subject} preempted{deadline_text}; saved at step {event['step']}, "
        "restarting on other nodes or with fewer workers"
    )


def describe_straddling_groups(start_event: dict[str, Any]) -> str | None:
    """Return a sentence about a "started" event's expert-parallel groups on several nodes; None without any."""
    if not (group_count := start_event["straddling_groups"]):
        return None
    sentence = f"{group_count} expert-parallel groups lie on more than one node"
    # Events of older versions of this project lack the fields `groups_apart` and `flat_groups`.
    if groups_apart := start_event.get("groups_apart"):
        sentence += f", {groups_apart} of them in more than one domain"
    if flat_groups := start_event.get("flat_groups"):
        sentence += f"; {flat_groups} with unequal numbers of ranks per node, where dispatch stays flat"
    return sentence
