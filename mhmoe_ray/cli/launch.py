"""Attempts of runs: how the last one ended, and starting the next one."""

import time
from typing import TYPE_CHECKING

from mhmoe_ray.cli.common import note
from mhmoe_ray.cli.connecting import cluster_for

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.cluster.run_outcome import Outcome
    from mhmoe_ray.runs.layout import RunDir
    from mhmoe_ray.spec import RunSpec


def start(run: "RunDir", spec: "RunSpec", connection: "Connection") -> None:
    """Submit the next attempt, and say so."""
    from mhmoe_ray.cluster.run_start import start_attempt

    job = start_attempt(run, spec, connection)
    note.print(f"run {run.id}  job {job}  dashboard {connection.address}", soft_wrap=True)


def go_on(run: "RunDir", spec: "RunSpec", address: str | None) -> "Connection":
    """Start the next attempt of a run, and return its cluster.

    Args:
        run: that is over, and not finished.
        spec: its own, perhaps with another cluster section.
        address: of the cluster, as commands take it.
    """
    needed = [spec.storage, spec.data.prepared]
    connection = cluster_for(spec.cluster, needed, spec.cluster.cpus, address)
    run.write_spec(spec)
    run.stop_file.unlink(missing_ok=True)
    start(run, spec, connection)
    return connection


def ended(run: "RunDir", force: bool, *, patient: bool = False) -> "Outcome | None":
    """How the run ended; None if its cluster is gone.

    Args:
        run: the run.
        force: take it for gone although the run wrote a moment ago.
        patient: where it did, wait until that is a while ago.

    Raises:
        RunError: it runs, or may still run.
        TokenError: its cluster wants a token that we do not have, so nobody can tell.
    """
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.run_outcome import QUIET_SECONDS, outcome, quiet, recorded_outcome
    from mhmoe_ray.errors import ClusterError, RunError, TokenError
    from mhmoe_ray.runs.attempts import last_attempt

    over = recorded_outcome(run)
    if over:
        return over
    try:
        over = outcome(run, connect(last_attempt(run).address), doubt=QUIET_SECONDS)
    except TokenError:
        raise
    except ClusterError as e:
        while (since := quiet(run)) < QUIET_SECONDS and not force:
            if not patient:
                why = f"its cluster does not answer ({e.why}), but it wrote something {since:.0f} s ago"
                fix = "make sure that no job of it runs any more, then wait, or use --force"
                raise RunError(f"run {run.id}", why, fix) from e
            note.print(f"waiting: its cluster does not answer, but it wrote something {since:.0f} s ago")
            time.sleep(QUIET_SECONDS - since)
        return None
    if over is None:
        raise RunError(f"run {run.id}", "it is still running", "see `mhmoe status`, or end it first: mhmoe stop")
    return over
