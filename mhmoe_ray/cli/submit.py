"""`mhmoe submit`: start a run and follow it.

This file also holds what other commands need of attempts: how the last one ended, and starting the next one.
"""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import jobs, plan
from mhmoe_ray.cli.common import AddressOption, DetachOption, SetOption, SpecArg, note, print_json, read_spec
from mhmoe_ray.cli.follow import follow
from mhmoe_ray.cli.jobs import cluster_to_train, name_of

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.cluster.runs import Outcome
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.spec import RunSpec


def start(run: "RunDir", spec: "RunSpec", connection: "Connection") -> None:
    """Submit the next attempt of a run, and print its job."""
    from mhmoe_ray.cluster.runs import start_attempt

    job = start_attempt(run, spec, connection)
    note.print(f"run {run.id}  job {job}  dashboard {connection.address}", soft_wrap=True)


def go_on(run: "RunDir", spec: "RunSpec", address: str | None) -> "Connection":
    """Start the next attempt of a run, and return the connection to its cluster.

    Args:
        run: a run that is over but not finished.
        spec: the run's spec, whose cluster section may have changed.
        address: address of the cluster, as commands take it.
    """
    connection = cluster_to_train(spec, address)
    run.write_spec(spec)
    run.stop_file.unlink(missing_ok=True)
    start(run, spec, connection)
    return connection


def ended(run: "RunDir", force: bool, *, patient: bool = False) -> "Outcome":
    """Return how the run ended.

    Args:
        run: the run.
        force: if its cluster does not answer, treat it as gone even though the run wrote something a moment ago.
        patient: in that case, wait until the run has been quiet for a while.

    Raises:
        RunError: the run is running, or may still be running.
        TokenError: its cluster requires a token that this machine does not have, so its state cannot be told.
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


def submit(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    address: AddressOption = None,
    detach: DetachOption = False,
    continue_: Annotated[
        bool,
        typer.Option(
            "--continue",
            help="Where a run of this spec is unfinished, go on with the newest such instead, on the cluster that a "
            "new run would go to.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job request and where workers would be; start nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --detach: print the run and its job as JSON.")] = False,
) -> None:
    """Start a run of a spec and follow it. Ctrl-C stops following, not the run.

    Without an address, a Ray cluster is started on this machine. Missing data is prepared first, as part of the job.
    For example `mhmoe submit jobs/quickstart.yaml --set train.steps=50`.
    """
    from mhmoe_ray.cli.plan_estimate import estimated
    from mhmoe_ray.cli.plan_placement import placement, said_of
    from mhmoe_ray.cluster.connect import is_local
    from mhmoe_ray.cluster.remote import job_request
    from mhmoe_ray.runs.directory import create_run, last_attempt
    from mhmoe_ray.train.job import TrainRequest

    if json and not (detach or dry_run):
        raise typer.BadParameter("--json tells of a run that is not followed: give --detach too")
    resolved = read_spec(spec, set_)
    if dry_run:
        place = resolved.storage / f"{resolved.name}-xxxxxx"
        placed = placement(resolved, address)
        request = TrainRequest(path=str(place), attempt=1)
        asked = job_request(request, is_local(address), resolved.cluster.runtime_env)
        print_json({**asked, "placement": placed.as_dict()})
        for line in said_of(placed):
            note.print(line, soft_wrap=True)
        return
    run = _unfinished(resolved) if continue_ else None
    again = run is not None
    if run:
        note.print(f"going on with run {run.id}")
        connection = go_on(run, resolved, address)
    else:
        jobs.check_can_train(resolved)
        if not json:
            # Where ranks would be matters for the cost alone, and that of CPUs is not told.
            layout = placement(resolved, address).layout if resolved.cluster.gpus_per_worker else None
            plan.show(resolved, estimated(resolved, layout))
        connection = jobs.cluster_to_train(resolved, address)
        run = create_run(resolved)
        start(run, resolved, connection)
    if json:
        print_json({"run": run.id, "path": str(run.path), **asdict(last_attempt(run))})
    elif not detach:
        # Who goes on with a run, whatever there is of it, is a launcher, and may take the cluster along when it ends. A
        # local cluster that is gone does not come back.
        follow(run, connection, from_now=again, for_ever=continue_ and not connection.local)


def _unfinished(spec: "RunSpec") -> "RunDir | None":
    """Return the newest run of this spec, if it is over without being finished; otherwise None.

    Raises:
        RunError: the run may still be running, or its spec differs from this one.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs.directory import list_runs

    runs = [run for run in list_runs(spec.storage) if run.name == spec.name and not run.is_imported]
    if not runs:
        return None
    newest = runs[-1]
    over = ended(newest, force=False, patient=True)
    if over.state == "finished":
        return None
    if other := spec.changed_from(newest.spec()):
        why = f"it is unfinished, and its spec differs in {', '.join(other)}"
        raise RunError(f"run {newest.id}", why, "submit without --continue to start anew, or give the spec that it has")
    return newest
