"""Attempts of runs: how the last one ended, and starting the next one."""

import time
from typing import TYPE_CHECKING

from mhmoe_ray.cli.common import note
from mhmoe_ray.cli.connecting import cluster_to_train, name_of

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.cluster.runs import Outcome
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.spec import RunSpec


def start(run: "RunDir", spec: "RunSpec", connection: "Connection") -> None:
    """Submit the next attempt, and say so."""
    from mhmoe_ray.cluster.runs import start_attempt

    job = start_attempt(run, spec, connection)
    note.print(f"run {run.id}  job {job}  dashboard {connection.address}", soft_wrap=True)


def go_on(run: "RunDir", spec: "RunSpec", address: str | None) -> "Connection":
    """Start the next attempt of a run, and return its cluster.

    Args:
        run: that is over, and not finished.
        spec: its own, perhaps with another cluster section.
        address: of the cluster, as commands take it.
    """
    connection = cluster_to_train(spec, address)
    run.write_spec(spec)
    run.stop_file.unlink(missing_ok=True)
    start(run, spec, connection)
    return connection


def ended(run: "RunDir", force: bool, *, patient: bool = False) -> "Outcome":
    """How the run ended.

    Args:
        run: the run.
        force: where its cluster does not answer, take it for gone although the run wrote a moment ago.
        patient: where it did, wait until that is a while ago.

    Raises:
        RunError: it runs, or may still run.
        TokenError: its cluster wants a token that we do not have, so nobody can tell.
    """
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.runs import QUIET_SECONDS, Outcome, outcome_or_gone, quiet
    from mhmoe_ray.errors import ClusterError, RunError, TokenError

    while True:
        try:
            over = outcome_or_gone(run, connect)
        except TokenError:
            raise
        except ClusterError as e:
            if force:
                return Outcome("failed", f"its cluster does not answer any more ({e.why})")
            since = quiet(run)
            if not patient:
                why = f"its cluster does not answer ({e.why}), but it wrote something {since:.0f} s ago"
                fix = "make sure that no job of it runs any more, then wait, or use --force"
                raise RunError(f"run {run.id}", why, fix) from e
            note.print(f"waiting: its cluster does not answer, but it wrote something {since:.0f} s ago")
            time.sleep(max(0.0, QUIET_SECONDS - since))
            continue
        if over is None:
            fix = f"see `mhmoe status {name_of(run)}`, or end it first: mhmoe stop {name_of(run)}"
            raise RunError(f"run {run.id}", "it is still running", fix)
        return over
