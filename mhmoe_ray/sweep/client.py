"""Client side of sweeps: start, follow and stop one from outside the cluster; the job in `job.py` does the work."""

import shlex
import time
from collections.abc import Sequence

from mhmoe_ray.cluster import jobs, remote
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.cluster.runs import outcome, recorded_outcome
from mhmoe_ray.errors import MhmoeError, RunError, SpecError, logged
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, last_attempt, newest_number
from mhmoe_ray.runs.sweeps import Order, SweepDir
from mhmoe_ray.spec import SweepRun
from mhmoe_ray.sweep.job import SweepRequest

POLL_SECONDS = 0.5


def check_same(place: SweepDir, wanted: Sequence[SweepRun]) -> None:
    """Check that no run of the sweep was started with a spec that differs from the one wanted now.

    Raises:
        SpecError: a wanted run was started with another spec, and would continue from the checkpoints of that one; or
            another seed of its variant was, and their losses would be averaged.
    """
    started = {name: run for name, run in place.runs().items() if newest_number(run)}
    variants = {entry.name: entry.variant for order in place.orders_before() for entry in order.entries}
    for name, run in started.items():
        same = [entry for entry in wanted if entry.name == name or entry.variant == variants.get(name)]
        if not same:
            continue
        before = run.spec()
        for entry in same:
            as_this = before.model_copy(update={"name": entry.spec.name, "seed": entry.spec.seed})
            if other := entry.spec.changed_from(as_this):
                seed = "" if name == entry.name else f", a seed of the same variant as {entry.name},"
                why = f"run {name}{seed} was started with another spec: {', '.join(other)}"
                fix = f"give the sweep another name, or remove that run: mhmoe rm {shlex.quote(str(run.path))}"
                raise SpecError(f"sweep {place.name}", why, fix)


def submit(
    place: SweepDir,
    connection: Connection,
    entries: Sequence[SweepRun],
    wanted: Sequence[str],
    *,
    size: str,
    concurrent: int,
) -> str:
    """Submit a job that starts runs, and write an order for it.

    The job of an earlier order ends when it sees the new order. If that job is still at work, the unfinished runs of
    its order are added to the new one.

    Args:
        place: the sweep's directory.
        connection: the cluster.
        entries: all entries of the sweep file.
        wanted: the names of the entries that are to run.
        size: the name of the sweep's size.
        concurrent: the number of runs at a time.

    Returns:
        The order's name.

    Raises:
        JobError, ClusterError, SpecError: the cluster does not accept the job; then no order is written.
    """
    order = Order(
        size=size,
        concurrent=concurrent,
        entries=list(entries),
        wanted=list(wanted),
        retry=_over_before(place, wanted),
        job="",
        address="",
        local=False,
        submitted=0.0,
    )
    at_work = _at_work(place)
    if at_work:
        known = {entry.name for entry in entries}
        runs = place.runs()
        others = [e for e in at_work.wanted_entries if e.name not in set(wanted)]
        others = [
            e for e in others if e.name not in runs or is_to_run(e.name, run := runs[e.name], state_of(run), at_work)
        ]
        order.entries += [e for e in others if e.name not in known]
        order.wanted += [e.name for e in others]
        order.retry = {**{e.name: n for e in others if (n := at_work.retry.get(e.name))}, **order.retry}
    return _start(place, connection, order, anew=True)


def again(place: SweepDir, connection: Connection, order: Order) -> str:
    """Submit another job for an order; runs that ended since the order was given are left as they are.

    Args:
        place: the sweep's directory.
        connection: the cluster.
        order: the order.

    Returns:
        The new order's name.

    Raises:
        JobError, ClusterError, SpecError: in the same cases as `submit`.
    """
    return _start(place, connection, order, anew=False)


def _start(place: SweepDir, connection: Connection, order: Order, *, anew: bool) -> str:
    """Submit the job of an order, write the order, and return its name.

    Args:
        place: the sweep's directory.
        connection: the cluster.
        order: the order without its job.
        anew: whether to start the job even if the sweep was stopped, which otherwise ends this job too.
    """
    name = place.new_order()
    request = SweepRequest(path=str(place.path), order=name)
    job = remote.submit(connection, order.entries[0].spec.cluster.runtime_env, request).name
    # Only now, for what the job may wait: an order whose job no cluster takes would end the one at work.
    if anew:
        place.stop_file.unlink(missing_ok=True)
    where = {"job": job, "address": connection.address, "local": connection.local, "submitted": time.time()}
    place.write_order(name, order.model_copy(update=where))
    return name


def state_of(run: RunDir) -> events.State:
    """Return the state of a run according to its events.

    A run without an attempt is about to get one, so its state is "submitted".
    """
    return events.state(events.events(run)) if newest_number(run) else "submitted"


def is_to_run(name: str, run: RunDir, state: events.State, order: Order) -> bool:
    """Return whether a run in this state goes on, or ended before the order was given and is to start again."""
    return not events.is_over(state) or (state != "finished" and newest_number(run) <= order.retry.get(name, 0))


def _over_before(place: SweepDir, wanted: Sequence[str]) -> dict[str, int]:
    """Return, by name, the newest attempt's number for each wanted run that failed, was stopped or is stopping."""
    found = {}
    for name, run in place.runs().items():
        if name in set(wanted) and (number := newest_number(run)):
            state = events.state(events.events(run))
            if state in ("failed", "stopped") or (run.stop_file.exists() and not events.is_over(state)):
                found[name] = number
    return found


def _at_work(place: SweepDir) -> Order | None:
    """Return the last order if its job is still at work; None otherwise."""
    try:
        order = place.order(place.orders()[-1]) if place.exists else None
        return order if order and not place.stop_file.exists() and is_alive(order) else None
    except MhmoeError:  # nobody can tell; its job makes way anyway
        return None


def is_alive(order: Order) -> bool:
    """Return whether the job that starts the runs of an order goes on.

    Raises:
        ClusterError: its cluster does not answer.
    """
    return jobs.is_alive(connect(order.address), order.job)


def own_error(order: Order) -> MhmoeError | None:
    """Return the error that the job of an order logged when it ended for a reason.

    None if the job was killed, or its cluster does not know it.
    """
    connection = connect(order.address)
    if jobs.status(connection, order.job) is None:
        return None
    return logged(jobs.logs(connection, order.job))


def stop(place: SweepDir) -> tuple[dict[str, events.State], list[MhmoeError]]:
    """Start no more runs, ask running ones to stop after a checkpoint, and end those that do not train yet.

    Returns:
        The states that the unfinished runs had, by name; and an error for each cluster that could not be asked. Workers
            learn of the stop from their run directory anyway.

    Raises:
        RunError: there is no such sweep.
    """
    if not place.exists:
        raise RunError(f"sweep {place.name}", "it was never started", "start it without --stop")
    place.stop_file.touch()  # first: whoever follows it would start the job again
    unasked = _end_jobs(place)
    running: dict[str, events.State] = {}
    for name, run in place.runs().items():
        state = events.state(events.events(run))
        if newest_number(run) and not events.is_over(state):
            run.stop_file.touch()
            running[name] = state
    for name, state in running.items():
        if state != "running":
            try:
                _end(place.runs()[name])
            except MhmoeError as e:
                unasked.setdefault(last_attempt(place.runs()[name]).address, e)
    return running, list(unasked.values())


def _end_jobs(place: SweepDir) -> dict[str, MhmoeError]:
    """End the jobs of all orders: the job of an earlier one may be preparing text, and would then start a run.

    Returns:
        The reason why the job of the last order could not be ended, by its cluster's address; empty if it was ended.
            Clusters of earlier orders may be long gone, so they are left out.
    """
    silent: dict[str, MhmoeError] = {}
    last = ""
    for order in place.orders_before():
        last = order.address
        if order.address not in silent:
            try:
                connection = connect(order.address)
                if jobs.is_alive(connection, order.job):
                    jobs.stop(connection, order.job)
                    while jobs.is_alive(connection, order.job):
                        time.sleep(POLL_SECONDS)
            except MhmoeError as e:
                silent[order.address] = e
    return {last: silent[last]} if last in silent else {}


def _end(run: RunDir) -> None:
    """End the job of a run at once, and record in the run directory how the run ended if its events do not say so."""
    attempt = last_attempt(run)
    connection = connect(attempt.address)
    if jobs.is_alive(connection, attempt.job):
        jobs.stop(connection, attempt.job)
    while (over := outcome(run, connection)) is None:
        time.sleep(POLL_SECONDS)
    if recorded_outcome(events.events(run)) is None:
        if over.state == "stopped":
            events.record(run, "stopped", reason="its job was ended")
        else:
            events.record(run, "failed", reason=over.reason)
