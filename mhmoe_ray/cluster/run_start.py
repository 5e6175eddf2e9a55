"""Starting an attempt of a run: a job on a cluster, recorded in the run directory."""

from contextlib import suppress
from typing import Any

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, newest_number
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location


def job_request(place: Location, attempt: int, spec: RunSpec, local: bool) -> dict[str, Any]:
    """What Ray Jobs is asked for; `submit --dry-run` prints it.

    Args:
        place: the run directory, whose name is the run's id.
        attempt: the number of the job.
        spec: of the run.
        local: as `jobs.request` takes it.
    """
    return jobs.request(
        ["-m", "mhmoe_ray.train.job", str(place), str(attempt)],
        f"{place.name}-{attempt}",
        local=local,
        runtime_env=spec.cluster.runtime_env,
        metadata={"mhmoe_run": place.name, "mhmoe_path": str(place)},
    )


def start_attempt(run: RunDir, spec: RunSpec, connection: Connection, known_as: str | None = None) -> str:
    """Submit the next attempt and record it.

    Args:
        run: its directory.
        spec: its own.
        connection: to the cluster.
        known_as: the cluster's address for those who will look at the run, where that is another one.

    Returns:
        The job's name.

    Raises:
        JobError, SpecError, ClusterError: the cluster does not take it; where it says so, the run counts as failed.
    """
    number = newest_number(run) + 1
    request = job_request(run.path, number, spec, connection.local)
    job, address = str(request["submission_id"]), known_as or connection.address
    # Recorded first: a job that runs unknown to its run directory could not be found again.
    add_attempt(run, Attempt(job, address, connection.local))
    events.record(run, "submitted", attempt=number, job=job, address=address)
    try:
        jobs.submit(connection, request)
    except BaseException as e:  # also Ctrl-C
        with suppress(ClusterError):  # one that does not answer may have taken it
            if jobs.status(connection, job) is None:
                why = str(e) or type(e).__name__
                events.record(run, "failed", reason=f"the job could not be submitted: {why}")
        raise
    return job
