"""How a run stands, from its directory and its job together."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.errors import ClusterError, TokenError
from mhmoe_ray.runs import events, jsonl
from mhmoe_ray.runs.directory import Attempt, RunDir, last_attempt, newest_number

QUIET_SECONDS = 120.0
"""Without a line from a run whose cluster does not answer, after which it counts as dead."""
_GRACE_SECONDS = 2.0  # between a job's end and its last event, which are not written by the same process
_SENDING_SECONDS = 300.0  # in which code and packages are sent to a cluster, which knows the job after that
_LOCAL_SECONDS = 30.0  # the same of a cluster of this machine, to which nothing is sent
_DOUBT_SECONDS = 30.0  # less than `patience.SECONDS`, so that who follows a run hears the end
_LONG_AGO = 10.0  # in seconds: that and what clocks of two machines may be apart


class Outcome(NamedTuple):
    state: events.State
    reason: str
    """Why it failed; empty otherwise."""


def outcome(run: RunDir, connection: Connection, doubt: float = _DOUBT_SECONDS) -> Outcome | None:
    """How the run ended; None while it goes on.

    Args:
        run: with an attempt.
        connection: to its cluster, or to whichever has its address now.
        doubt: seconds since it last wrote, up to which a cluster that does not know its job is taken for another.

    A job that is dead while its directory says it runs was killed, or its cluster is gone: that is a failure too.

    Raises:
        ClusterError: the directory does not say, and the cluster does not answer or is not the run's.
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
    """As `outcome`; and over, too, where its cluster does not answer and it has been quiet for long.

    Args:
        run: with an attempt.
        reach: the cluster at an address.

    Raises:
        ClusterError: its cluster does not answer, but it wrote something a moment ago; or it wants another token.
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
    """Seconds since it last wrote."""
    return time.time() - max(jsonl.modified(run.events_file), jsonl.modified(run.metrics_file))


def recorded_outcome(happened: list[dict[str, Any]]) -> Outcome | None:
    """As the events in its directory say."""
    state = events.state(happened)
    if not events.is_over(state):
        return None
    failed = events.newest(happened, "failed") if state == "failed" else None
    return Outcome(state, failed["reason"] if failed else "")
