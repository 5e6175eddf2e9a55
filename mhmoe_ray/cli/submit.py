"""`mhmoe submit`: start a run and follow it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

import mhmoe_ray as mh
from mhmoe_ray.cli import options, plan
from mhmoe_ray.cli.follow import follow_run
from mhmoe_ray.cli.output import note, print_json, print_note, show_activity

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.spec import RunSpec


def submit(
    spec: options.SpecArg,
    set_: options.SetOption = [],  # noqa: B006 - typer needs the list
    storage: options.SpecStorageOption = None,
    address: options.AddressOption = None,
    detach: options.DetachOption = False,
    continue_: Annotated[
        bool,
        typer.Option(
            "--continue",
            help="Resume the newest run of this spec if it is unfinished, on the cluster that a new run would go to. "
            "If it runs, follow it.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job request and where workers would be; start nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --detach: print the run and its job as JSON.")] = False,
) -> None:
    """Start a run of a spec and follow it. Ctrl-C stops following, not the run.

    Without an address, a Ray cluster is started on this machine. Missing data is prepared first, as part of the job.
    For example `mhmoe submit spec.yaml --set train.steps=50`.
    """
    show_activity("checking the spec and its data")
    from mhmoe_ray.api.attempts import start_run
    from mhmoe_ray.api.connection import check_training
    from mhmoe_ray.api.placement import choose_for_cluster, forecast_placement, placement_remarks
    from mhmoe_ray.api.plan import estimate_step
    from mhmoe_ray.cluster.connect import uses_local_cluster
    from mhmoe_ray.cluster.remote import job_request
    from mhmoe_ray.planner.search import keep_choice
    from mhmoe_ray.runs.directory import last_attempt
    from mhmoe_ray.train.job import TrainRequest

    if json and not (detach or dry_run):
        raise typer.BadParameter("--json prints a run that is not followed: give --detach too")
    resolved = mh.load_spec(spec, options.with_storage(set_, storage))
    if dry_run:
        # Only a real run gets an id that ends in random digits, so x's stand for the digits.
        run_path = resolved.storage / f"{resolved.name}-xxxxxx"
        resolved, _ = choose_for_cluster(resolved, address)
        placement = forecast_placement(resolved, address, print_note)
        request = TrainRequest(path=str(run_path), attempt=1)
        submission = job_request(request, uses_local_cluster(address), resolved.cluster.runtime_env)
        print_json({**submission, "placement": placement.as_dict()})
        for line in placement_remarks(placement):
            print_note(line)
        return
    run, is_running = _unfinished_run(resolved) if continue_ else (None, False)
    is_resumed = run is not None
    if run and is_running:
        note.print(f"run {run.id} is running")
    elif run:
        note.print(f"resuming run {run.id}")
        start_run(keep_choice(resolved, run.spec()), address, print_note, ended_run=run)
    else:
        check_training(resolved)
        if not json:
            # The settings and the cost in the summary depend on the placement, but not those of a run on CPUs.
            planned, _ = choose_for_cluster(resolved, address)
            has_gpus = planned.cluster.gpus_per_worker
            layout = forecast_placement(planned, address, print_note).layout if has_gpus else None
            plan.print_summary(planned, estimate_step(planned, layout))
        run = start_run(resolved, address, print_note)
    if json:
        print_json({"run": run.id, "path": str(run.path), **asdict(last_attempt(run))})
    elif not detach:
        # `--continue` is for launchers, which may shut the cluster down when this command ends. The command therefore
        # retries forever if the cluster does not answer, except for a local cluster, which does not come back.
        follow_run(run, from_now=is_resumed, for_ever=continue_ and not last_attempt(run).local)


def _unfinished_run(spec: "RunSpec") -> "tuple[RunDir | None, bool]":
    """Return the newest run of this spec if it is unfinished, and whether it runs; a RunError says that it differs."""
    from mhmoe_ray.api.attempts import RunningError, final_outcome
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.planner.search import keep_choice
    from mhmoe_ray.runs.directory import list_runs

    runs = [run for run in list_runs(spec.storage) if run.name == spec.name and not run.is_imported]
    if not runs:
        return None, False
    newest_run, is_running = runs[-1], False
    try:
        if final_outcome(newest_run, is_patient=True, on_note=print_note).state == "finished":
            return None, False
    except RunningError:
        is_running = True
    if sections := keep_choice(spec, newest_run.spec()).changed_keys(newest_run.spec()):
        reason = f"it is unfinished, and its spec differs in {', '.join(sections)}"
        raise RunError(
            f"run {newest_run.id}", reason, "submit without --continue to start a new run, or give its own spec"
        )
    return newest_run, is_running
