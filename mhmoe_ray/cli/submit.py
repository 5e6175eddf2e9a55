"""`mhmoe submit`: start a run and follow it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import connecting, launch, plan
from mhmoe_ray.cli.common import AddressOption, DetachOption, SetOption, SpecArg, note, print_json, read_spec
from mhmoe_ray.cli.follow import follow

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.spec import RunSpec


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
    from mhmoe_ray.cluster.runs import job_request
    from mhmoe_ray.runs.directory import create_run, last_attempt

    if json and not (detach or dry_run):
        raise typer.BadParameter("--json tells of a run that is not followed: give --detach too")
    resolved = read_spec(spec, set_)
    if dry_run:
        place = resolved.storage / f"{resolved.name}-xxxxxx"
        placed = placement(resolved, address)
        print_json({**job_request(place, 1, resolved, local=is_local(address)), "placement": placed.as_dict()})
        for line in said_of(placed):
            note.print(line, soft_wrap=True)
        return
    run = _unfinished(resolved) if continue_ else None
    again = run is not None
    if run:
        note.print(f"going on with run {run.id}")
        connection = launch.go_on(run, resolved, address)
    else:
        connecting.check_can_train(resolved)
        if not json:
            # Where ranks would be matters for the cost alone, and that of CPUs is not told.
            layout = placement(resolved, address).layout if resolved.cluster.gpus_per_worker else None
            plan.show(resolved, estimated(resolved, layout))
        connection = connecting.cluster_to_train(resolved, address)
        run = create_run(resolved)
        launch.start(run, resolved, connection)
    if json:
        print_json({"run": run.id, "path": str(run.path), **asdict(last_attempt(run))})
    elif not detach:
        # Who goes on with a run, whatever there is of it, is a launcher, and may take the cluster along when it ends. A
        # local cluster that is gone does not come back.
        follow(run, connection, from_now=again, for_ever=continue_ and not connection.local)


def _unfinished(spec: "RunSpec") -> "RunDir | None":
    """The newest run of this spec, if it is over without being finished.

    Raises:
        RunError: it may still run, or its spec is another one.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs.directory import list_runs

    runs = [run for run in list_runs(spec.storage) if run.name == spec.name and not run.is_imported]
    if not runs:
        return None
    newest = runs[-1]
    over = launch.ended(newest, force=False, patient=True)
    if over.state == "finished":
        return None
    if other := spec.changed_from(newest.spec()):
        why = f"it is unfinished, and its spec differs in {', '.join(other)}"
        raise RunError(f"run {newest.id}", why, "submit without --continue to start anew, or give the spec that it has")
    return newest
