"""`mhmoe submit`: start a run and follow it."""

from typing import Annotated

import typer

from mhmoe_ray.cli import launch, plan
from mhmoe_ray.cli.common import AddressOption, DetachOption, SetOption, SpecArg, note, print_json, read_spec
from mhmoe_ray.cli.follow import follow


def submit(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    address: AddressOption = None,
    detach: DetachOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job request and where workers would be; start nothing.")
    ] = False,
) -> None:
    """Start a run of a spec and follow it. Ctrl-C stops following, not the run.

    Without an address, a Ray cluster is started on this machine. Missing data is prepared first, as part of the job.
    """
    from mhmoe_ray.cli.plan_placement import placement, said_of
    from mhmoe_ray.cluster.connect import is_local
    from mhmoe_ray.data.order.mixture import training_order
    from mhmoe_ray.data.shards.manifest import check_recipe, read_data_manifest
    from mhmoe_ray.data.sources import find_files
    from mhmoe_ray.runs.layout import create_run

    resolved = read_spec(spec, set_)
    if dry_run:
        run = resolved.storage / f"{resolved.name}-xxxxxx"
        placed = placement(resolved, address)
        print_json({**launch.job_request(run, 1, resolved, local=is_local(address)), "placement": placed.as_dict()})
        for line in said_of(placed):
            note.print(line, soft_wrap=True)
        return
    # What is wrong with the data is said now, not by a job that has just started.
    prepared = read_data_manifest(resolved.data.prepared)
    if prepared:
        check_recipe(resolved.data.prepared, prepared, resolved)
        training_order(resolved, prepared)
    else:
        find_files(resolved.data)
    plan.show(resolved)
    connection = launch.cluster_for(
        resolved.cluster, [resolved.storage, resolved.data.prepared], resolved.cluster.cpus, address
    )
    run_dir = create_run(resolved)
    launch.start(run_dir, resolved, connection)
    if not detach:
        follow(run_dir, connection)
