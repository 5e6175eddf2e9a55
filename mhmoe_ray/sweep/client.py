"""Starting, following and stopping a sweep from outside; `job.py` is what does the work."""

import time
from collections.abc import Sequence
from contextlib import suppress

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.errors import ClusterError, MhmoeError, RunError, SpecError, logged
from mhmoe_ray.runs import events
from mhmoe_ray.runs.attempts import last_attempt, read_attempts
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.sweeps import Order, SweepDir
from mhmoe_ray.spec import SweepRun

POLL_SECONDS = 0.5
_SENDING_SECONDS = 60.0
"""After an order was written, in which its cluster need not know its job yet: code and packages are sent first."""


def check_same(place: SweepDir, wanted: Sequence[SweepRun]) -> None:
    """Raises:
    SpecError: one of them was started with another spec. It would go on from the checkpoints of that one.
    """
    started = place.runs()
    for entry in wanted:
        run = started.get(entry.name)
        if run and (other := entry.spec.changed_from(run.spec())):
            why = f"run {entry.name} was started with another spec: {', '.join(other)}"
            fix = f"give the sweep another name, or remove that run: mhmoe rm {run.id}"
            raise SpecError(f"sweep {place.name}", why, fix)


def submit(
    place: SweepDir,
    connection: Connection,
    entries: Sequence[SweepRun],
    wanted: Sequence[str],
    *,
    size: str,
    concurrent: int,
    retry: bool,
) -> str:
    """Write down what is asked for, and start the job that does it; jobs of earlier orders make way for it.

    Args:
        place: the sweep's directory.
        connection: to the cluster.
        entries: all that the sweep's file has.
        wanted: names of those that are to run.
        size: of the sweep's.
        concurrent: runs at a time.
        retry: whether runs that failed or were stopped are started again.

    Returns:
        The order's name.

    Raises:
        ClusterError, SpecError: the cluster does not take the job; then nothing was asked for.
    """
    name = place.new_order()
    job = f"sweep-{place.name}-{name}"
    args = ["-m", "mhmoe_ray.sweep.job", str(place.path), name]
    request = jobs.request(args, job, local=connection.local, runtime_env=entries[0].spec.cluster.runtime_env)
    order = Order(
        size=size,
        concurrent=concurrent,
        entries=list(entries),
        wanted=list(wanted),
        retry=retry,
        job=job,
        address=connection.address,
        local=connection.local,
        submitted=time.time(),
    )
    place.stop_file.unlink(missing_ok=True)
    place.write_order(name, order)  # before the job, which reads it
    try:
        jobs.submit(connection, request)
    except BaseException:  # also Ctrl-C
        with suppress(ClusterError):  # one that does not answer may have taken it
            if jobs.status(connection, job) is None:
                place.withdraw(name)
        raise
    return name


def again(place: SweepDir, connection: Connection, order: Order) -> str:
    """Start another job for an order whose own has ended. What failed or was stopped meanwhile is left alone, unless
    that job never was.

    Args:
        place: the sweep's directory.
        connection: to the cluster.
        order: as it was.

    Returns:
        The new order's name.
    """
    never_was = order.retry and jobs.status(connection, order.job) is None
    return submit(
        place,
        connection,
        order.entries,
        order.wanted,
        size=order.size,
        concurrent=order.concurrent,
        retry=never_was,
    )


def is_alive(order: Order) -> bool:
    """Whether the job that starts its runs goes on, or may yet begin.

    Raises:
        ClusterError: its cluster does not answer.
    """
    found = jobs.info(connect(order.address), order.job)
    if found is None:
        return abs(time.time() - order.submitted) < _SENDING_SECONDS
    return found.is_alive


def own_error(order: Order) -> MhmoeError | None:
    """What its job said of itself when it ended for a reason; None if it was killed."""
    connection = connect(order.address)
    if jobs.status(connection, order.job) is None:
        return None
    return logged(jobs.logs(connection, order.job))


def stop(place: SweepDir) -> tuple[dict[str, events.State], list[ClusterError]]:
    """Start no more runs, and ask those that run to stop after a checkpoint. Those that do not train yet are ended.

    Returns:
        The runs' states by their names; and which clusters could not be asked. Workers hear of it from their run
        directory anyway.

    Raises:
        RunError: there is no such sweep.
    """
    if not place.exists:
        raise RunError(f"sweep {place.name}", "it was never started", "start it without --stop")
    place.stop_file.touch()  # first: whoever follows it would start the job again
    unasked: dict[str, ClusterError] = {}
    for order in map(place.order, place.orders()):  # an earlier one's job may be preparing text, and then start a run
        if order.address not in unasked:
            try:
                _end(order)
            except ClusterError as e:
                unasked[order.address] = e
    running: dict[str, events.State] = {}
    for name, run in place.runs().items():
        if read_attempts(run) and not events.is_over(state := events.state(events.events(run))):
            run.stop_file.touch()
            running[name] = state
            if state != "running":
                try:
                    _end_job(run)
                except ClusterError as e:
                    unasked.setdefault(last_attempt(run).address, e)
    return running, list(unasked.values())


def _end(order: Order) -> None:
    connection = connect(order.address)
    if jobs.is_alive(connection, order.job):
        jobs.stop(connection, order.job)
        while jobs.is_alive(connection, order.job):
            time.sleep(POLL_SECONDS)


def _end_job(run: RunDir) -> None:
    attempt = last_attempt(run)
    connection = connect(attempt.address)
    if jobs.is_alive(connection, attempt.job):
        jobs.stop(connection, attempt.job)
