"""`mhmoe logs`: what a run's job wrote."""

from typing import Annotated

import typer

from mhmoe_ray.cli.common import STORAGE, JsonOption, RunArg, StorageOption, print_json


def logs(
    run: RunArg = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until the job ends.")] = False,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """Print the log of a run's newest attempt, workers included."""
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.runs.layout import find_run
    from mhmoe_ray.runs.state import last_attempt

    attempt = last_attempt(find_run(run, storage, with_job=True))
    connection = connect(attempt.address)
    if follow:
        for line in jobs.follow_logs(connection, attempt.job):
            print(line, flush=True)
        return
    text = jobs.logs(connection, attempt.job)
    if json:
        print_json({"job": attempt.job, "lines": text.splitlines()})
    else:
        print(text, end="" if text.endswith("\n") else "\n")
