"""Events of a run in its events.jsonl; the state of a run, which follows from them; and sentences about events."""

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, Required, get_origin

from pydantic import Field
from typing_extensions import TypedDict

from mhmoe_ray.errors import StorageError
from mhmoe_ray.parsing import Count, Figure, Parser, Time, object_parser
from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec.cluster import ClusterSpec, format_mesh

EventKind = Literal[
    "submitted", "began", "preparing", "prepared", "initialized", "waiting", "restoring", "started", "hung", "lost",
    "straggler", "checkpoint", "profile", "preempted", "adapted", "referenced", "spike", "skipped_checkpoint",
    "dropped_checkpoint", "finished", "stopped", "failed", "served", "answering", "answered", "imported",
]  # fmt: skip
# Older versions of this project recorded the path of a skipped checkpoint in place of its name.
_Name = Annotated[str, Field(pattern=r"(^|/)step_[0-9]{1,18}\.[0-9]{1,18}$")]
# `began` and `start_ticks` are the start time of the process.
_Worker = TypedDict("_Worker", {  # noqa: UP013 - a class would take a line for each field
    "rank": Required[Count], "pid": Required[Count], "host": Required[str], "node": Required[str], "began": Time,
    "start_ticks": Count | None,
}, total=False)  # fmt: skip
# Slow steps of the last `steps`, own time over that of the other ranks, and the part of it that is longer.
_SlowRank = TypedDict("_SlowRank", {  # noqa: UP013
    "rank": Required[Count], "host": Required[str], "node": Required[str], "slow_steps": Required[Count],
    "steps": Required[Count], "slowdown": Required[Figure], "part": str,
}, total=False)  # fmt: skip
FIELDS: dict[EventKind, dict[str, Any]] = {
    "submitted": {"attempt": Count, "job": str, "address": str},
    "began": {"attempt": Count, "host": str, "pid": Count},  # the process of the attempt's job
    "preparing": {"folder": Required[str]},  # folder of the prepared data
    # Data without texts has no baselines (data.shards.manifest.Baselines), which are all fields but the first.
    "prepared": {"validation_tokens": Count, "unigram_entropy": Figure, "bigram": Figure, "bigram_tokens": Count},
    # Key of the spec's section `start`, descriptions of the models that the run starts from, and the checkpoint's name.
    "initialized": {"how": str, "sources": Required[list[str]], "step": Count, "name": Required[_Name]},
    "waiting": {"missing": str},  # text that names the resources which the cluster lacks for the workers
    # Name of the checkpoint that the workers start from; null if they start anew.
    "restoring": {"name": Required[_Name | None], "step": Count, "attempt": Count},
    # Number of the worker group, sizes of the mesh, ranks of each expert-parallel group, numbers of groups on several
    # nodes and in several network domains, flat or hierarchical, number of groups that hierarchical dispatch leaves
    # flat, and the spec's cluster.workers.
    "started": {
        "group": Required[Count], "step": Required[Count], "dp": Count, "ep": Count, "groups": list[list[Count]],
        "straddling_groups": Count, "groups_apart": Count, "dispatch": str, "flat_groups": Count,
        "asked": Count | dict[str, Count | None], "workers": Required[list[_Worker]],
    },
    # Last step, phase such as training, seconds since the last heartbeat or progress, true if heartbeats were missing.
    # What its process does ("stopped", or where it is), ranks that wait for it by collective, and the file of stacks.
    "hung": {
        "rank": Required[Count], "host": Required[str], "pid": Required[Count], "step": Required[Count],
        "doing": Required[str], "seconds": Required[Figure], "silent": Required[bool],
        "state": str | None, "waiting": dict[str, list[Count]], "stacks": str | None,
    },
    # Ranks that have become slow and those that still are; empty if none is any more.
    "straggler": {"step": Required[Count], "ranks": Required[list[_SlowRank]]},
    # Last lines of the rank's log, and number of all failed ranks.
    "lost": {
        "rank": Required[Count], "reason": Required[str], "host": Required[str | None], "lines": Required[list[str]],
        "ranks": Required[Count],
    },
    # Seconds that training waited, and seconds until the checkpoint was committed.
    "checkpoint": {"step": Count, "name": Required[_Name], "pause": Figure, "seconds": Figure},
    # First of the profiled steps and their number, number of ranks, and folder in profiles/.
    "profile": {"step": Required[Count], "steps": Required[Count], "ranks": Required[Count], "name": Required[str]},
    # Ids of the preempted nodes, and seconds since the epoch.
    "preempted": {"step": Required[Count], "nodes": Required[list[str]], "deadline": Required[Time | None]},
    # New number of experts that a task of a vision model chooses.
    "adapted": {"step": Required[Count], "task": Required[str], "top_k": Required[Count]},
    # Pairs whose reference log-probabilities were computed, of training and of validation.
    "referenced": {"pairs": Required[Count], "held_out": Required[Count], "seconds": Required[Figure]},
    "spike": {"step": Required[Count], "reason": Required[str]},  # a step whose update was skipped
    "skipped_checkpoint": {"name": Required[_Name], "reason": Required[str]},
    "dropped_checkpoint": {"name": str},
    "finished": {"step": Count},
    "stopped": {"step": Count, "reason": str},  # step if the workers ended as requested, reason if the job was ended
    "failed": {"reason": str},
    # Address of the cluster, and name of the checkpoint.
    "served": dict.fromkeys(("application", "url", "address", "checkpoint"), Required[str]),
    "answering": {"output": Required[str], "checkpoint": Required[str]},  # folder of a batch inference
    "answered": {"output": Required[str]},  # folder of a batch inference whose rows are all answered
    "imported": {"source": Required[str], "model_type": str | None, "step": Count, "name": Required[_Name]},
}  # fmt: skip
"""Types of the fields of each kind of event besides `time` and `event`; code relies on the required ones alone."""
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
    required = {name for name, field_type in FIELDS[kind].items() if get_origin(field_type) is Required}
    assert required <= fields.keys() <= FIELDS[kind].keys(), f"not the fields of {kind}: {fields.keys()}"
    jsonl.append(run.events_file, {"time": time.time(), "event": kind, **fields})


def record_use(run: RunDir, kind: EventKind, on_note: Callable[[str], object], **fields: Any) -> None:
    """Record the use of a checkpoint; `on_note` gets a warning if the run, which stays usable, cannot be written."""
    try:
        record(run, kind, **fields)
    except StorageError as e:
        on_note(f"warning: {e}")


_COMMON_FIELDS = {"time": Required[Time], "event": Required[str]}
_parse_common_fields = object_parser(_COMMON_FIELDS)
_PARSERS: dict[str, Parser] = {kind: object_parser(_COMMON_FIELDS | fields) for kind, fields in FIELDS.items()}


def parse(line: bytes) -> dict[str, Any]:
    """Return the event of a line; one without the fields of its kind is a ValueError."""
    return _PARSERS.get(_parse_common_fields(line)["event"], _parse_common_fields)(line)


def read(run: RunDir) -> list[dict[str, Any]]:
    """Return all events of a run, oldest first."""
    return list(jsonl.read(run.events_file, parse))


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
    waiting_texts = [
        f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))} {'wait' if len(ranks) > 1 else 'waits'} "
        f"in {collective}"
        for collective, ranks in event.get("waiting", {}).items()
    ]
    # Events of older versions of this project lack the fields `state`, `waiting` and `stacks`.
    waiting_text = " and ".join(waiting_texts) + " for " if waiting_texts else ""
    state_text = f", which is {event['state']}" if event.get("state") else ""
    stacks_text = f" (stacks of all ranks: {event['stacks']})" if event.get("stacks") else ""
    return (
        f"{waiting_text}rank {event['rank']} (process {event['pid']} on {event['host']}){state_text}: it "
        f"{symptom} for {event['seconds']:.0f} s, {event['doing']} after step {event['step']}, and was killed"
        f"{stacks_text}"
    )


def describe_slow_rank(rank: dict[str, Any]) -> str:
    """Return a phrase about a slow rank, from an entry of a "straggler" event."""
    return (
        f"rank {rank['rank']} on {rank['host']} (node {rank['node'][:12]}) takes "
        f"{rank['slowdown']:.1f} times as long as the others ({rank['part']}), in "
        f"{rank['slow_steps']} of {rank['steps']} steps"
    )


def slow_ranks(run_events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the slow ranks of the newest worker group, as its newest "straggler" event has them."""
    event: dict[str, Any] = next((e for e in reversed(run_events) if e["event"] in ("started", "straggler")), {})
    ranks: list[dict[str, Any]] = event["ranks"] if event.get("event") == "straggler" else []
    return ranks


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
    if not (group_count := start_event.get("straddling_groups")):
        return None
    sentence = f"{group_count} expert-parallel groups lie on more than one node"
    # Events of older versions of this project lack the fields `groups_apart` and `flat_groups`.
    if groups_apart := start_event.get("groups_apart"):
        sentence += f", {groups_apart} of them in more than one domain"
    if flat_groups := start_event.get("flat_groups"):
        sentence += f"; {flat_groups} with unequal numbers of ranks per node, where dispatch stays flat"
    return sentence
