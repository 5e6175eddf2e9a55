"""Runs on a cluster: start an attempt, find its outcome, and collect everything that `mhmoe status` shows of a run."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from mhmoe_ray.cluster import jobs, remote
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.cluster.serving import applications
from mhmoe_ray.errors import ClusterError, MhmoeError, TokenError
from mhmoe_ray.runs import events, jsonl, metrics
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, last_attempt, newest_number, read_attempts
from mhmoe_ray.runs.history import course
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import location
from mhmoe_ray.train.job import TrainRequest

QUIET_SECONDS = 120.0
"""Seconds without a line from a run whose cluster does not answer, after which the run counts as dead."""
_GRACE_SECONDS = 2.0  # between a job's end and its last event, which are not written by the same process
_SENDING_SECONDS = 300.0  # in which code and packages are sent to a cluster, which knows the job after that
_LOCAL_SECONDS = 30.0  # the same of a cluster of this machine, to which nothing is sent
_DOUBT_SECONDS = 30.0  # less than `patience.SECONDS`, so that who follows a run hears the end
_LONG_AGO = 10.0  # in seconds: that and what clocks of two machines may be apart


class Outcome(NamedTuple):
    state: events.State
    reason: str
    """Reason of a failure; empty otherwise."""


def outcome(run: RunDir, connection: Connection, doubt: float = _DOUBT_SECONDS) -> Outcome | None:
    """Return how the run ended; None while it goes on.

    A job that is dead while the run directory says it runs was killed, or its cluster is gone: that is a failure too.

    Args:
        run: a run with at least one attempt.
        connection: the run's cluster, or whichever cluster has its address now.
        doubt: seconds since the run last wrote, below which a cluster that does not know its job is taken for another
            cluster.

    Raises:
        ClusterError: the run directory does not say, and the cluster does not answer or is not the run's.
    """
    over = recorded_outcome(events.events(run))
    if over:
        return over
    attempt = last_attempt(run)
    job = jobs.info(connection, attempt.job)
    if job and job.is_alive:
        return None
    if abs(time.time() - (job.ended if job else attempt.submitted)) < _LONG_AGO:
        time.sleep(_GRACE_SECONDS)
        over = recorded_outcome(events.events(run))
        if over:
            return over
        job = job or jobs.info(connection, attempt.job)
        if job and job.is_alive:
            return None
    if job is None and _may_be_on_its_way(run, attempt):
        return None
    if job is None and not attempt.local and (since := quiet(run)) < doubt:
        why = f"it knows no job {attempt.job}, but the run wrote something {since:.0f} s ago"
        raise ClusterError(f"cluster {connection.address}", why, "see whether another cluster is behind that address")
    if job is None:
        return Outcome("failed", f"the cluster does not know its job {attempt.job} any more")
    if job.status == "STOPPED" and run.stop_file.exists():
        return Outcome("stopped", "")
    return Outcome("failed", f"its job ended ({job.status.lower()}): {job.message}")


def _may_be_on_its_way(run: RunDir, attempt: Attempt) -> bool:
    began = events.newest(events.events(run), "began")
    has_begun = began is not None and began["attempt"] == newest_number(run)
    seconds = _LOCAL_SECONDS if attempt.local else _SENDING_SECONDS
    return not has_begun and abs(time.time() - attempt.submitted) < seconds


def outcome_or_gone(run: RunDir, reach: Callable[[str], Connection]) -> Outcome | None:
    """Return the result of `outcome`, but count a run as failed if it is quiet and its cluster does not answer.

    Quiet means that it wrote nothing for `QUIET_SECONDS`.

    Args:
        run: a run with at least one attempt.
        reach: a function that connects to the cluster at an address.

    Raises:
        ClusterError: the run's cluster does not answer, but the run wrote something a moment ago.
        TokenError: the cluster wants another token.
    """
    over = recorded_outcome(events.events(run))
    if over:
        return over
    try:
        return outcome(run, reach(last_attempt(run).address), doubt=QUIET_SECONDS)
    except TokenError:
        raise
    except ClusterError as e:
        if quiet(run) < QUIET_SECONDS:
            raise
        return Outcome("failed", f"its cluster does not answer any more ({e.why})")


def quiet(run: RunDir) -> float:
    """Return the seconds since the run last wrote an event or a line of metrics."""
    return time.time() - max(jsonl.modified(run.events_file), jsonl.modified(run.metrics_file))


def recorded_outcome(happened: list[dict[str, Any]]) -> Outcome | None:
    """Return how the run ended according to its events; None if they do not say that it ended."""
    state = events.state(happened)
    if not events.is_over(state):
        return None
    failed = events.newest(happened, "failed") if state == "failed" else None
    return Outcome(state, failed["reason"] if failed else "")


def start_attempt(run: RunDir, spec: RunSpec, connection: Connection, known_as: str | None = None) -> str:
    """Submit the next attempt of a run and record it.

    Args:
        run: the run directory.
        spec: the run's spec.
        connection: the cluster.
        known_as: the address of the cluster for readers of the run, if it differs from the connection's.

    Returns:
        The job's name.

    Raises:
        JobError, SpecError, ClusterError: the cluster did not accept the job; if the cluster confirms that, the run
            counts as failed.
    """
    number = newest_number(run) + 1
    request = TrainRequest(path=str(run.path), attempt=number)
    job, address = request.job_name, known_as or connection.address
    # Recorded first: a job that runs unknown to its run directory could not be found again.
    add_attempt(run, Attempt(job, address, connection.local))
    events.record(run, "submitted", attempt=number, job=job, address=address)
    try:
        remote.submit(connection, spec.cluster.runtime_env, request)
    except BaseException as e:  # also Ctrl-C
        with suppress(ClusterError):  # one that does not answer may have taken it
            if jobs.status(connection, job) is None:
                why = str(e) or type(e).__name__
                events.record(run, "failed", reason=f"the job could not be submitted: {why}")
        raise
    return job


Happened = list[dict[str, Any]]


def standing(run: RunDir) -> dict[str, Any]:
    """Return everything that `mhmoe status` shows of a run, as JSON.

    The key `cluster` says whether the cluster confirmed the state.
    """
    happened = events.events(run)
    spec = None if run.is_imported else run.spec()
    went = course(run, spec.train.validate_every if spec else 1)
    attempts = read_attempts(run)
    state, reason, cluster = state_of(run, happened)
    last = went.last
    started = events.newest(happened, "started")
    lost = events.newest(happened, "lost")
    eta = None
    if spec and last and state == "running" and went.mean_rate:
        eta = (spec.train.steps - last[metrics.STEP]) * last[metrics.TOKENS] / last[metrics.STEP] / went.mean_rate
    return {
        "run": run.id,
        "path": str(run.path),
        "state": state,
        "reason": reason,
        "cluster": cluster,
        "dashboard": attempts[-1].address if attempts else None,
        "job": attempts[-1].job if attempts else None,
        "source": next((e["source"] for e in happened if e["event"] == "imported"), None),
        "attempts": len(attempts),
        "worker_starts": sum(e["event"] == "started" for e in happened),
        "steps": spec.train.steps if spec else None,
        "last": last,
        "validation": _with_perplexity(went.validation),
        "missing": _missing(state, happened),
        "baselines": events.newest(happened, "prepared"),
        "asked": _asked(spec) if spec else None,
        "started": started,
        "interruptions": [{"time": when, "what": what} for when, what in events.interruptions(happened)],
        "last_lines": lost["lines"] if lost else [],
        "skipped_steps": last.get(metrics.SKIPPED_STEPS, 0) if last else 0,
        "skipped_checkpoints": [e["name"] for e in happened if e["event"] == "skipped_checkpoint"],
        "checkpoint": events.newest(happened, "checkpoint") or events.newest(happened, "imported"),
        "tokens_per_s": went.rate,
        "mean_tokens_per_s": went.mean_rate,
        "eta_seconds": eta,
        "served": served(run, happened),
        "curve": [
            {key: line.get(key) for key in (metrics.STEP, metrics.LOSS, metrics.TOKENS_PER_S)} for line in went.curve
        ],
    }


def state_of(run: RunDir, happened: Happened, connected: Callable[[str], Connection] = connect) -> tuple[str, str, str]:
    """Return the state of a run, the reason of a failure, and a phrase on what its cluster said.

    The state is "unknown" if the cluster must be asked but does not answer.
    """
    attempts = read_attempts(run)
    over, cluster = recorded_outcome(happened), "not asked: the run is over"
    said = events.state(happened)
    if over is None and attempts:
        try:
            over = outcome(run, connected(attempts[-1].address), doubt=QUIET_SECONDS)
            cluster = "the job is alive" if over is None else "the job is dead"
        except ClusterError as e:
            return "unknown", "", f"it said {said} last, but {e}"
    return (over.state, over.reason, cluster) if over else (said, "", cluster)


def _missing(state: str, happened: Happened) -> str | None:
    """Return the resources that a run that waits for them lacks, as its job says; None for a run that does not wait."""
    waiting = events.newest(happened, "waiting") if state == "waiting" else None
    return waiting.get("missing") if waiting else None


def _with_perplexity(line: dict[str, Any] | None) -> dict[str, Any] | None:
    if line is None:
        return None
    return {**line, "val_perplexity": metrics.perplexity(line[metrics.VAL_LOSS])}


def _asked(spec: RunSpec) -> dict[str, Any]:
    cluster = spec.cluster
    return {
        "workers": cluster.workers.model_dump(),
        "ep": cluster.ep,
        "cpus_per_worker": cluster.cpus_per_worker,
        "gpus_per_worker": cluster.gpus_per_worker,
    }


def served(run: RunDir, happened: Happened, seconds: float = 10) -> list[dict[str, Any]]:
    """Return the applications that serve checkpoints of a run, on the clusters that its events say it was deployed to.

    An application has the status "unknown" if its cluster does not answer.

    Args:
        run: the run.
        happened: the run's events.
        seconds: the timeout for the answer of each cluster.
    """
    deployed = {(e["address"], e["application"]): e for e in happened if e["event"] == "served"}
    found = []
    for address in {address for address, _ in deployed}:
        try:
            there = {a.name: a for a in applications(connect(address), seconds)}
        except MhmoeError as e:
            names = [name for where, name in deployed if where == address]
            found += [
                {"application": n, "url": deployed[address, n]["url"], "status": "unknown", "message": e.why}
                | {"checkpoint": deployed[address, n]["checkpoint"]}
                for n in names
            ]
            continue
        for application in there.values():
            checkpoint = location(application.checkpoint) if application.checkpoint else None
            if checkpoint and RunDir.of_checkpoint(checkpoint) == run:
                where = {"application": application.name, "url": application.url, "checkpoint": checkpoint.name}
                found.append({**where, "status": application.status, "message": application.message})
    return found
