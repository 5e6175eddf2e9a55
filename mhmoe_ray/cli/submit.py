"""`mhmoe submit`: start a run and follow it.

Other commands use its functions that return the outcome of a run's last attempt and start its next attempt.
"""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import jobs, plan
from mhmoe_ray.cli.common import AddressOption, DetachOption, SetOption, SpecArg, note, print_json, read_spec
from mhmoe_ray.cli.follow import follow_run
from mhmoe_ray.cli.jobs import connect_to_train, run_argument

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.cluster.runs import Outcome
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.spec import RunSpec


def submit_attempt(run: "RunDir", spec: "RunSpec", connection: "Connection") -> None:
    """Submit the next attempt of a run as a job on the cluster, and print the run, the job and the dashboard."""
    from mhmoe_ray.cluster.runs import start_attempt

    job = start_attempt(run, spec, connection)
    note.print(f"run {run.id}  job {job}  dashboard {connection.address}", soft_wrap=True)


def resume_run(run: "RunDir", spec: "RunSpec", address: str | None) -> "Connection":
    """Start the next attempt of a run that has ended, and return the connection to its cluster.

    Args:
        run: a run that is over but not finished.
        spec: the run's spec, whose cluster section may have changed; it is written to the run directory.
        address: address of the cluster; None for the default.

    Raises:
        ClusterError, SpecError: as in `connect_to_train`.
    """
    connection = connect_to_train(spec, address)
    run.write_spec(spec)
    # The stop file of an earlier stop is removed, because it would stop the new attempt too.
    run.stop_file.unlink(missing_ok=True)
    submit_attempt(run, spec, connection)
    return connection


def final_outcome(run: "RunDir", force: bool, *, is_patient: bool = False) -> "Outcome":
    """Return the outcome of a run that is over; raise if it is not over.

    A run also counts as over, and failed, if its cluster does not answer and it has written nothing for a while.

    Args:
        run: the run.
        force: whether to treat a cluster that does not answer as gone, even if the run wrote something a moment ago.
        is_patient: whether to wait, if the cluster does not answer, until the run has written nothing for a while.

    Raises:
        RunError: the run is running, or may still be running.
        TokenError: its cluster requires a token that this machine does not have, so its state is unknown.
    """
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.runs import QUIET_SECONDS, Outcome, outcome_or_lost, seconds_since_write
    from mhmoe_ray.errors import ClusterError, RunError, TokenError

    while True:
        try:
            outcome = outcome_or_lost(run, connect)
        # A TokenError is also a ClusterError, but its cluster answers and may still train the run. The run must not
        # count as lost, so the error is raised again.
        except TokenError:
            raise
        except ClusterError as e:
            if force:
                return Outcome("failed", f"its cluster does not answer any more ({e.reason})")
            quiet_seconds = seconds_since_write(run)
            if not is_patient:
                reason = f"its cluster does not answer ({e.reason}), but it wrote something {quiet_seconds:.0f} s ago"
                fix = "make sure that no job of it runs any more, then wait, or use --force"
                raise RunError(f"run {run.id}", reason, fix) from e
            note.print(f"waiting: its cluster does not answer, but it wrote something {quiet_seconds:.0f} s ago")
            time.sleep(max(0.0, QUIET_SECONDS - quiet_seconds))
            continue
        if outcome is None:
            fix = f"see `mhmoe status {run_argument(run)}`, or end it first: mhmoe stop {run_argument(run)}"
            raise RunError(f"run {run.id}", "it is still running", fix)
        return outcome


def submit(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    address: AddressOption = None,
    detach: DetachOption = False,
    continue_: Annotated[
        bool,
        typer.Option(
            "--continue",
            help="Resume the newest run of this spec if it is unfinished, on the cluster that a new run would go to.",
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
    from mhmoe_ray.cli.plan_estimate import estimate_step
    from mhmoe_ray.cli.plan_placement import forecast_placement, placement_remarks
    from mhmoe_ray.cluster.connect import uses_local_cluster
    from mhmoe_ray.cluster.remote import job_request
    from mhmoe_ray.runs.directory import create_run, last_attempt
    from mhmoe_ray.train.job import TrainRequest

    if json and not (detach or dry_run):
        raise typer.BadParameter("--json prints a run that is not followed: give --detach too")
    resolved = read_spec(spec, set_)
    if dry_run:
        # Only a real run gets an id that ends in random digits, so x's stand for the digits.
        run_path = resolved.storage / f"{resolved.name}-xxxxxx"
        placement = forecast_placement(resolved, address)
        request = TrainRequest(path=str(run_path), attempt=1)
        submission = job_request(request, uses_local_cluster(address), resolved.cluster.runtime_env)
        print_json({**submission, "placement": placement.as_dict()})
        for line in placement_remarks(placement):
            note.print(line, soft_wrap=True)
        return
    run = _unfinished_run(resolved) if continue_ else None
    is_resumed = run is not None
    if run:
        note.print(f"resuming run {run.id}")
        connection = resume_run(run, resolved, address)
    else:
        jobs.check_training_data(resolved)
        if not json:
            # Only the cost in the summary depends on the placement. A run on CPUs has no estimated cost, so it needs no
            # placement here.
            layout = forecast_placement(resolved, address).layout if resolved.cluster.gpus_per_worker else None
            plan.print_summary(resolved, estimate_step(resolved, layout))
        connection = jobs.connect_to_train(resolved, address)
        run = create_run(resolved)
        submit_attempt(run, resolved, connection)
    if json:
        print_json({"run": run.id, "path": str(run.path), **asdict(last_attempt(run))})
    elif not detach:
        # `--continue` is for launchers, which may shut the cluster down when this command ends. The command therefore
        # retries forever if the cluster does not answer, except for a local cluster, which does not come back.
        follow_run(run, connection, from_now=is_resumed, for_ever=continue_ and not connection.local)


def _unfinished_run(spec: "RunSpec") -> "RunDir | None":
    """Return the newest run of this spec if it has ended unfinished; return None if it is finished or there is none.

    Raises:
        RunError: the run may still be running, or its spec differs from this one.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs.directory import list_runs

    runs = [run for run in list_runs(spec.storage) if run.name == spec.name and not run.is_imported]
    if not runs:
        return None
    newest_run = runs[-1]
    outcome = final_outcome(newest_run, force=False, is_patient=True)
    if outcome.state == "finished":
        return None
    if changed_keys := spec.changed_keys(newest_run.spec()):
        reason = f"it is unfinished, and its spec differs in {', '.join(changed_keys)}"
        raise RunError(
            f"run {newest_run.id}", reason, "submit without --continue to start a new run, or give its own spec"
        )
    return newest_run
