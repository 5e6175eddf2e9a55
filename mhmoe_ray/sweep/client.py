"""Starting, following and stopping a sweep from outside; `job.py` is what does the work."""

import time
from collections.abc import Sequence

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.errors import MhmoeError, RunError, SpecError, logged
from mhmoe_ray.runs import events
from mhmoe_ray.runs.sweeps import Definition, SweepDir, SweepJob
from mhmoe_ray.spec import SweepRun

POLL_SECONDS = 0.5


def define(place: SweepDir, planned: Sequence[SweepRun], wanted: Sequence[str], size: str, concurrent: int) -> None:
    """Write down what is to run, beside what was started before.

    Raises:
        SpecError: a run that was started has another spec now.
    """
    before = place.definition() if place.exists else None
    started, now = place.runs(), {run.name: run for run in planned}
    for entry in before.entries if before else []:
        if entry.name in started and entry.name in now:
            _check_same(place, entry, now[entry.name])
    others = [e for e in (before.entries if before else []) if e.name in started and e.name not in now]
    made = before.jobs if before else []
    entries = [*planned, *others]
    place.define(Definition(size=size, concurrent=concurrent, entries=entries, wanted=list(wanted), jobs=made))
    place.stop_file.unlink(missing_ok=True)


def _check_same(place: SweepDir, was: SweepRun, now: SweepRun) -> None:
    if other := now.spec.changed_from(was.spec):
        why = f"run {was.name} was started with another spec: {', '.join(other)}"
        fix = f"give the sweep another name, or remove {place.path} to begin anew"
        raise SpecError(f"sweep {place.name}", why, fix)


def submit(place: SweepDir, connection: Connection, *, retry: bool) -> None:
    """Start the job that starts runs; one that does so already makes way for it.

    Args:
        place: its directory.
        connection: to the cluster.
        retry: whether runs that failed or were stopped are started again.
    """
    definition = place.definition()
    spec = definition.entries[0].spec
    name = f"sweep-{place.name}-{int(time.time())}-{len(definition.jobs) + 1}"
    args = ["-m", "mhmoe_ray.sweep.job", str(place.path), name]
    request = jobs.request(args, name, local=connection.local, runtime_env=spec.cluster.runtime_env)
    job = SweepJob(job=name, address=connection.address, local=connection.local, submitted=time.time(), retry=retry)
    place.define(definition.model_copy(update={"jobs": [*definition.jobs, job]}))
    jobs.submit(connection, request)


def is_alive(place: SweepDir) -> bool:
    """Whether the job that starts runs goes on.

    Raises:
        ClusterError: its cluster does not answer.
    """
    submitted = place.definition().jobs
    if not submitted:
        return False
    return jobs.is_alive(connect(submitted[-1].address), submitted[-1].job)


def own_error(place: SweepDir) -> MhmoeError | None:
    """What the job said of itself when it ended for a reason; None if it was killed."""
    last = place.definition().jobs[-1]
    connection = connect(last.address)
    if jobs.status(connection, last.job) is None:
        return None
    return logged(jobs.logs(connection, last.job))


def stop(place: SweepDir) -> list[str]:
    """Start no more runs, and ask those that run to stop after a checkpoint.

    Returns:
        Their names.

    Raises:
        RunError: there is no such sweep.
        ClusterError: its cluster does not answer.
    """
    if not place.exists:
        raise RunError(f"sweep {place.name}", "it was never started", "start it without --stop")
    place.stop_file.touch()  # first: whoever follows it would start the job again
    if is_alive(place):
        last = place.definition().jobs[-1]
        jobs.stop(connect(last.address), last.job)
        while is_alive(place):  # it may be starting a run
            time.sleep(POLL_SECONDS)
    running = {name: run for name, run in place.runs().items() if not events.is_over(events.state(events.events(run)))}
    for run in running.values():
        run.stop_file.touch()
    return list(running)
