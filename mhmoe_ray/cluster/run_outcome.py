"""How a run stands, from its directory and its job together."""

import time
from typing import NamedTuple

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.runs import events
from mhmoe_ray.runs.attempts import last_attempt
from mhmoe_ray.runs.layout import RunDir

_GRACE_SECONDS = 2.0  # between a job's end and its last event, which are not written by the same process
_LONG_AGO = 10.0  # in seconds: that and what clocks of two machines may be apart


class Outcome(NamedTuple):
    state: events.State
    reason: str
    """Why it failed; empty otherwise."""


def outcome(run: RunDir, connection: Connection) -> Outcome | None:
    """How the run ended; None while it goes on.

    A job that is dead while its directory says it runs was killed, or its cluster is gone: that is a failure too.

    Raises:
        ClusterError: the directory does not say and the cluster does not answer.
    """
    over = recorded_outcome(run)
    if over:
        return over
    attempt = last_attempt(run)
    job = jobs.info(connection, attempt.job)
    if job and job.is_alive:
        return None
    if abs(time.time() - (job.ended if job else attempt.submitted)) < _LONG_AGO:
        time.sleep(_GRACE_SECONDS)
        over = recorded_outcome(run)
        if over:
            return over
    if job is None:
        return Outcome("failed", f"the cluster does not know its job {attempt.job} any more")
    if job.status == "STOPPED" and run.stop_file.exists():
        return Outcome("stopped", "")
    return Outcome("failed", f"its job ended ({job.status.lower()}): {job.message}")


def recorded_outcome(run: RunDir) -> Outcome | None:
    """As its directory says."""
    happened = events.events(run)
    state = events.state(happened)
    if not events.is_over(state):
        return None
    failed = events.newest(happened, "failed") if state == "failed" else None
    return Outcome(state, failed["reason"] if failed else "")
