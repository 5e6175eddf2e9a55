"""`mhmoe submit`: start a run and follow it."""

from pathlib import Path
from typing import Annotated

import typer

from mhmoe_ray.cli import launch, plan
from mhmoe_ray.cli.common import AddressOption, DetachOption, SetOption, SpecArg, print_json, read_spec
from mhmoe_ray.cli.follow import follow


def submit(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006
    address: AddressOption = None,
    detach: DetachOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job request and start nothing.")] = False,
) -> None:
    """Start a run of a spec and follow it. Ctrl-C stops following, not the run.

    Without an address, a Ray cluster is started on this machine. Missing data is prepared first, as part of the job.
    """
    from mhmoe_ray.data.raw import find_files
    from mhmoe_ray.runs.layout import create_run

    resolved = read_spec(spec, set_)
    if dry_run:
        run = Path(resolved.storage) / f"{resolved.name}-xxxxxx"
        print_json(launch.job_request(run, 1, resolved, local=address is None))
        return
    if not resolved.data.prepared.exists():
        find_files(resolved.data)  # a missing folder is said now, not by a job that has just started
    plan.show(resolved)
    connection = launch.cluster_for(resolved, address)
    run_dir = create_run(resolved)
    launch.start(run_dir, resolved, connection)
    if not detach:
        follow(run_dir, connection)
