"""Runs on a cluster: start an attempt, find its outcome, and collect everything that `mhmoe status` shows of a run."""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from mhmoe_ray.checkpoint.manifest import step_and_group
from mhmoe_ray.cluster import jobs, remote
from mhmoe_ray.cluster.connect import Connection, connect_recorded
from mhmoe_ray.cluster.serving import applications
from mhmoe_ray.errors import ClusterError, MhmoeError, TokenError
from mhmoe_ray.runs import events, jsonl, metrics
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, last_attempt, newest_attempt_number, read_attempts
from mhmoe_ray.runs.history import read_trend
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import location
from mhmoe_ray.train.job import TrainRequest

QUIET_SECONDS = 120.0
"""Seconds without a new event or metric after which a run whose cluster does not answer counts as dead."""
_GRACE_SECONDS = 2.0
"""Seconds to wait for the last event after a job's end: another process records it, perhaps later."""
_SENDING_SECONDS = 300.0
"""Timeout for sending code and packages to a cluster, which does not know the job until they arrive."""
_LOCAL_SECONDS = 30.0
"""Timeout until the local cluster knows a submitted job; it is short because no code is sent there."""
_DOUBT_SECONDS = 30.0
"""Seconds since a run's last write within which a job unknown to a remote cluster is a ClusterError in `outcome`.

A following client tolerates such errors for `dashboard.SECONDS`, which is longer, so it still learns that the run
failed.
"""
_RECENT_SECONDS = 10.0
"""Seconds after a job's end in which `outcome` still waits for the run's last event; two machines' clocks may differ.

If the cluster does not know the job, the time counts from its submission.
"""


class Outcome(NamedTuple):
    """Final state of a run, with the reason if it failed."""

    state: events.State
    reason: str
    """Reason of a failure; empty otherwise."""


def outcome(run: RunDir, connection: Connection, doubt: float = _DOUBT_SECONDS) -> Outcome | None:
    """Return how a run ended, according to its run directory or else its job; None while it runs.

    A dead job whose run directory shows a running run was killed or lost its cluster, and counts as a failure. If the
    cluster does not know the job but the run wrote something within `doubt` seconds, another cluster must have the
    address now. Both this and no answer are ClusterErrors. The run must have an attempt.
    """
    if known_outcome := recorded_outcome(events.read(run)):
        return known_outcome
    attempt = last_attempt(run)
    job = jobs.info(connection, attempt.job)
    if job and job.is_alive:
        return None
    if abs(time.time() - (job.end_time if job else attempt.submitted)) < _RECENT_SECONDS:
        time.sleep(_GRACE_SECONDS)
        if known_outcome := recorded_outcome(events.read(run)):
            return known_outcome
        job = job or jobs.info(connection, attempt.job)
        if job and job.is_alive:
            return None
    if job is None and _may_be_starting(run, attempt):
        return None
    if job is None and not attempt.local and (quiet_seconds := seconds_since_write(run)) < doubt:
        reason = f"it knows no job {attempt.job}, but the run wrote something {quiet_seconds:.0f} s ago"
        raise ClusterError(
            f"cluster {connection.address}", reason, "check whether another cluster has that address now"
        )
    if job is None:
        return Outcome("failed", f"the cluster does not know its job {attempt.job} any more")
    if job.status == "STOPPED" and run.stop_file.exists():
        return Outcome("stopped", "")
    return Outcome("failed", f"its job ended ({job.status.lower()}): {job.message}")


def _may_be_starting(run: RunDir, attempt: Attempt) -> bool:
    """Return whether the cluster may not know the job yet, because code and packages are still being sent to it."""
    begin_event = events.newest_event(events.read(run), "began")
    is_begun = begin_event is not None and begin_event.get("attempt") == newest_attempt_number(run)
    seconds = _LOCAL_SECONDS if attempt.local else _SENDING_SECONDS
    return not is_begun and abs(time.time() - attempt.submitted) < seconds


def outcome_or_lost(run: RunDir, connect_to: Callable[[str], Connection]) -> Outcome | None:
    """Return how a run ended, like `outcome`, but even if its cluster is gone; None while the run goes on.

    If the cluster does not answer, the run counts as failed once it has written nothing for `QUIET_SECONDS`; earlier,
    the ClusterError is raised. A TokenError is always raised.
    """
    if known_outcome := recorded_outcome(events.read(run)):
        return known_outcome
    try:
        return outcome(run, connect_to(last_attempt(run).address), doubt=QUIET_SECONDS)
    except TokenError:
        raise
    except ClusterError as e:
        if seconds_since_write(run) < QUIET_SECONDS:
            raise
        return Outcome("failed", f"its cluster does not answer any more ({e.reason})")


def seconds_since_write(run: RunDir) -> float:
    """Return how many seconds ago the run last wrote an event or a line of metrics."""
    return time.time() - max(jsonl.modification_time(run.events_file), jsonl.modification_time(run.metrics_file))


def recorded_outcome(run_events: list[dict[str, Any]]) -> Outcome | None:
    """Return how a run ended according to its events; None if they record no end."""
    state = events.state(run_events)
    if not events.is_end_state(state):
        return None
    failed = events.newest_event(run_events, "failed") if state == "failed" else None
    return Outcome(state, failed.get("reason", "") if failed else "")


def start_attempt(
    run: RunDir,
    spec: RunSpec,
    connection: Connection,
    public_address: str | None = None,
    on_note: Callable[[str], object] = lambda line: None,
) -> str:
    """Submit the job of a run's next attempt, record the attempt in the run directory, and return the job's name.

    `public_address` is the cluster's address for readers of the run directory, if it is not the connection's. If the
    job is not accepted, its error is raised, and the run counts as failed if the cluster confirms that it does not know
    the job.
    """
    number, token = newest_attempt_number(run) + 1, secrets.token_hex(8)
    request = TrainRequest(path=str(run.path), attempt=number, token=token)
    job, address = remote.submission_id(request.job_name), public_address or connection.address
    # Record the attempt before its job is submitted, because a job that the run directory does not name could not be
    # found again.
    add_attempt(run, Attempt(job, address, connection.local, token=token), number)
    # The spec is written after the attempt is recorded, so that only the command that starts the attempt changes it.
    run.write_spec(spec)
    run.clear_stop()
    run.clear_profile_request()
    events.record(run, "submitted", attempt=number, job=job, address=address)
    try:
        remote.submit(connection, spec.cluster.runtime_env, request, on_note)
    except BaseException as e:
        # `BaseException` includes Ctrl-C. The run counts as failed only if the cluster says that it does not know the
        # job. If the cluster does not answer, it may have accepted the job, so the run is left as it is.
        with suppress(ClusterError):
            if jobs.info(connection, job) is None:
                reason = str(e) or type(e).__name__
                events.record(run, "failed", reason=f"the job could not be submitted: {reason}")
        raise
    return job


REQUESTED_RESOURCES = {"workers", "ep", "cpus_per_worker", "gpus_per_worker"}
"""Keys of a spec's section `cluster` that `mhmoe status` shows."""
RunEvents = list[dict[str, Any]]
"""Events of a run, oldest first."""


def run_status(run: RunDir) -> dict[str, Any]:
    """Return what `mhmoe status` shows of a run, as JSON; `cluster` tells whether the cluster confirmed the state."""
    run_events = events.read(run)
    spec = None if run.is_imported else run.spec()
    run_course = read_trend(run, spec.train.validate_every if spec else 1)
    start_record = read_start(run)
    attempts = read_attempts(run)
    state, reason, cluster = state_of(run, run_events)
    last_line = run_course.last_line
    start_event = events.newest_event(run_events, "started")
    waiting_event = events.newest_event(run_events, "waiting") if state == "waiting" else None
    loss_event = events.last_loss(run_events)
    checkpoint_event, skipped_names = _newest_checkpoint(run, run_events)
    eta = None
    if spec and last_line and state == "running" and run_course.mean_rate:
        eta = (
            (spec.train.steps - last_line[metrics.STEP])
            * last_line[metrics.TOKENS]
            / last_line[metrics.STEP]
            / run_course.mean_rate
        )
    return {
        "run": run.id,
        "path": str(run.path),
        "state": state,
        "reason": reason,
        "cluster": cluster,
        "dashboard": attempts[-1].address if attempts else None,
        "job": attempts[-1].job if attempts else None,
        "source": next((e["source"] for e in run_events if e["event"] == "imported"), None),
        "start": start_record.model_dump(mode="json") if start_record else None,
        "attempts": len(attempts),
        "worker_starts": sum(e["event"] == "started" for e in run_events),
        "steps": spec.train.steps if spec else None,
        "last": last_line,
        "loss_unit": spec.loss_unit if spec is not None else None,
        "validation": _with_perplexity(run_course.validation_line, spec),
        "missing": waiting_event.get("missing") if waiting_event else None,
        "baselines": events.newest_event(run_events, "prepared"),
        "asked": spec.cluster.model_dump(include=REQUESTED_RESOURCES) if spec else None,
        "started": start_event,
        "interruptions": [{"time": event_time, "what": text} for event_time, text in events.interruptions(run_events)],
        "slow_ranks": events.slow_ranks(run_events) if state == "running" else [],
        "last_lines": loss_event["lines"] if loss_event else [],
        "skipped_steps": last_line.get(metrics.SKIPPED_STEPS, 0) if last_line else 0,
        "skipped_checkpoints": skipped_names,
        "checkpoint": checkpoint_event,
        "tokens_per_s": run_course.rate,
        "mean_tokens_per_s": run_course.mean_rate,
        "eta_seconds": eta,
        "served": serving_applications(run, run_events),
        "curve": [
            {key: line.get(key) for key in (metrics.STEP, metrics.LOSS, metrics.TOKENS_PER_S)}
            for line in run_course.curve
        ],
    }


def _newest_checkpoint(run: RunDir, run_events: RunEvents) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the event of the newest checkpoint not skipped as damaged, and the names of newer skipped ones."""
    # Every restart of the workers that skips a checkpoint records its name again, and older versions of this project
    # recorded the path in place of the name.
    skipped_names = dict.fromkeys(
        e["name"].rpartition("/")[2] for e in run_events if e["event"] == "skipped_checkpoint"
    )
    usable_events = [e for e in run_events if "name" in e and e["name"] not in skipped_names]
    newest_events = (events.newest_event(usable_events, kind) for kind in ("checkpoint", "initialized", "imported"))
    newest = next(filter(None, newest_events), None)

    def position(name: str) -> tuple[int, int]:
        return step_and_group(run.checkpoints / name)

    return newest, [name for name in skipped_names if newest is None or position(name) > position(newest["name"])]


def state_of(
    run: RunDir, run_events: RunEvents, connect_to: Callable[[str], Connection] = connect_recorded
) -> tuple[str, str, str]:
    """Return the state of a run, the reason for a failure, and a phrase on whether its cluster confirmed the state.

    The cluster is asked unless the events record an end; if it does not answer, the state is "unknown".
    """
    attempts = read_attempts(run)
    known_outcome, cluster = recorded_outcome(run_events), "not asked: the run is over"
    last_state = events.state(run_events)
    if known_outcome is None and attempts:
        try:
            known_outcome = outcome(run, connect_to(attempts[-1].address), doubt=QUIET_SECONDS)
            cluster = "the job is alive" if known_outcome is None else "the job is dead"
        except ClusterError as e:
            return "unknown", "", f"it said {last_state} last, but {e}"
    return (known_outcome.state, known_outcome.reason, cluster) if known_outcome else (last_state, "", cluster)


def _with_perplexity(line: dict[str, Any] | None, spec: RunSpec | None) -> dict[str, Any] | None:
    """Add the perplexity to a line of metrics; it is None if the loss is not in nats per token."""
    if line is None:
        return None
    has_perplexity = spec is None or spec.loss_unit == "nats per token"
    return {**line, "val_perplexity": metrics.perplexity(line[metrics.VAL_LOSS]) if has_perplexity else None}


def serving_applications(run: RunDir, run_events: RunEvents) -> list[dict[str, Any]]:
    """Return a run's applications on all clusters that its events name, as JSON; "unknown" if one does not answer."""
    deployed = events.deployments(run_events)
    entries = []
    for address in dict.fromkeys(address for address, _ in deployed):
        try:
            entries += applications_at(run, address, 10)
        except MhmoeError as e:
            names = [name for application_address, name in deployed if application_address == address]
            entries += [
                {"application": n, "url": deployed[address, n]["url"], "status": "unknown", "message": e.reason}
                | {"checkpoint": deployed[address, n]["checkpoint"]}
                for n in names
            ]
    return entries


def applications_at(run: RunDir, address: str, seconds: float) -> list[dict[str, Any]]:
    """Return the applications on the cluster at `address` that serve a run's checkpoints.

    `seconds` is the timeout; no answer is a ClusterError, a refused or missing token a TokenError.
    """
    entries = []
    for application in applications(connect_recorded(address), seconds):
        for name, path in application.checkpoints.items():
            checkpoint = location(path)
            if RunDir.of_checkpoint(checkpoint) == run:
                entry = {"application": name, "url": application.url, "checkpoint": checkpoint.name}
                entries.append({**entry, "status": application.status, "message": application.message})
    return entries
