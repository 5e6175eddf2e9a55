"""Client side of sweeps: start, follow and stop a sweep from outside the cluster; the job in `job.py` starts runs."""

import shlex
import time
from collections.abc import Sequence

from mhmoe_ray.cluster import jobs, remote
from mhmoe_ray.cluster.connect import Connection, connect_recorded, is_known
from mhmoe_ray.cluster.runs import outcome, recorded_outcome
from mhmoe_ray.cluster.submissions import record_settings, unrecorded_settings
from mhmoe_ray.errors import MhmoeError, RunError, SpecError, StorageError, logged
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, last_attempt, newest_attempt_number
from mhmoe_ray.runs.sweeps import SweepDir, SweepOrder
from mhmoe_ray.spec import SweepRun
from mhmoe_ray.storage import report_write_errors
from mhmoe_ray.sweep.job import SweepRequest
from mhmoe_ray.sweep.plan import with_sweep_names

POLL_SECONDS = 0.5


def check_unchanged_specs(sweep_dir: SweepDir, wanted_entries: Sequence[SweepRun]) -> None:
    """Raise a SpecError if a wanted run, or another seed of its variant, was started with another spec."""
    # If its spec changed, a run would continue from checkpoints of the old spec, and a report would average the losses
    # of different specs.
    started_runs = {name: run for name, run in sweep_dir.runs().items() if newest_attempt_number(run)}
    variants = {entry.name: entry.variant for order in sweep_dir.earlier_orders() for entry in order.entries}
    for name, run in started_runs.items():
        related_entries = [
            entry for entry in wanted_entries if entry.name == name or entry.variant == variants.get(name)
        ]
        if not related_entries:
            continue
        started_spec = run.spec()
        for entry in related_entries:
            expected_spec = started_spec.model_copy(update={"name": entry.spec.name, "seed": entry.spec.seed})
            if changed_keys := entry.spec.changed_keys(with_sweep_names(expected_spec, entry)):
                seed = "" if name == entry.name else f", a seed of the same variant as {entry.name},"
                reason = f"run {name}{seed} was started with another spec: {', '.join(changed_keys)}"
                fix = f"give the sweep another name, or remove that run: mhmoe rm {shlex.quote(str(run.path))}"
                raise SpecError(f"sweep {sweep_dir.name}", reason, fix)


def submit(
    sweep_dir: SweepDir,
    connection: Connection,
    entries: Sequence[SweepRun],
    wanted_names: Sequence[str],
    *,
    size: str,
    concurrent: int,
) -> str:
    """Submit the job that starts the wanted runs of a sweep, write its order, and return the order's name.

    `entries` are all runs of the sweep file, and `concurrent` is the largest number of runs at the same time. The job
    of an earlier order ends when it sees the new order, which includes the earlier order's unfinished runs if that job
    is still alive. If the cluster does not accept the job, its error is raised, and no order is written.
    """
    record_settings(*(entry.spec for entry in entries))
    order = SweepOrder(
        size=size,
        concurrent=concurrent,
        entries=list(entries),
        wanted=list(wanted_names),
        retry=_ended_attempts(sweep_dir, wanted_names),
        job="",
        address="",
        local=False,
        submitted=0.0,
    )
    active_order = _active_order(sweep_dir)
    if active_order:
        known_names = {entry.name for entry in entries}
        runs = sweep_dir.runs()
        other_entries = [e for e in active_order.wanted_entries if e.name not in set(wanted_names)]
        unfinished_entries = [
            entry
            for entry in other_entries
            if (run := runs.get(entry.name)) is None or is_to_run(entry.name, run, state_of(run), active_order)
        ]
        order.entries += [e for e in unfinished_entries if e.name not in known_names]
        order.wanted.extend(e.name for e in unfinished_entries)
        retries = {e.name: n for e in unfinished_entries if (n := active_order.retry.get(e.name))}
        order.retry = {**retries, **order.retry}
    return _submit_order(sweep_dir, connection, order, clear_stop=True)


def restart_job(sweep_dir: SweepDir, connection: Connection, order: SweepOrder) -> str:
    """Submit another job for an order, without the runs that ended since then, and return the new order's name."""
    return _submit_order(sweep_dir, connection, order, clear_stop=False)


def _submit_order(sweep_dir: SweepDir, connection: Connection, order: SweepOrder, *, clear_stop: bool) -> str:
    """Submit the job of an order, fill in the order's fields about the job, write the order, and return its name.

    `clear_stop` cancels an earlier stop of the sweep, which would end this job too. Settings that run code and that
    this user has never submitted are a SpecError.
    """
    # Entries of an earlier order come from the sweep's directory, which somebody else may have written.
    for entry in order.entries:
        if settings := unrecorded_settings(entry.spec):
            reason = f"its run {entry.name} has settings that this user has not submitted: {', '.join(settings)}"
            raise SpecError(f"sweep {sweep_dir.name}", reason, "give the sweep another name")
    name = sweep_dir.new_order_name()
    request = SweepRequest(path=str(sweep_dir.path), order=name, known_addresses=_known_addresses(sweep_dir))
    job = remote.submit(connection, order.entries[0].spec.cluster.runtime_env, request).name
    # A new order (request to start runs) makes the job of the earlier order end. It is therefore written only after a
    # cluster has accepted the job of the new order, and that job waits for it.
    if clear_stop:
        with report_write_errors(sweep_dir.stop_file):
            sweep_dir.stop_file.unlink(missing_ok=True)
    job_fields = {"job": job, "address": connection.address, "local": connection.local, "submitted": time.time()}
    sweep_dir.write_order(name, order.model_copy(update=job_fields))
    return name


def _known_addresses(sweep_dir: SweepDir) -> tuple[str, ...]:
    addresses = {order.address for order in sweep_dir.earlier_orders()}
    addresses |= {last_attempt(run).address for run in sweep_dir.runs().values() if newest_attempt_number(run)}
    return tuple(sorted(filter(is_known, addresses)))


def state_of(run: RunDir) -> events.State:
    """Return the state of a run from its log of events; "submitted" for a run that was never started."""
    return events.state(events.read(run)) if newest_attempt_number(run) else "submitted"


def is_to_run(name: str, run: RunDir, state: events.State, order: SweepOrder) -> bool:
    """Return whether the job of an order still has to start a run, or to wait for its end."""
    return not events.is_end_state(state) or (
        state != "finished" and newest_attempt_number(run) <= order.retry.get(name, 0)
    )


def _ended_attempts(sweep_dir: SweepDir, wanted_names: Sequence[str]) -> dict[str, int]:
    """Return the newest attempt's number of each wanted run that failed, was stopped or is stopping, by run name."""
    attempt_numbers = {}
    for name, run in sweep_dir.runs().items():
        if name in set(wanted_names) and (number := newest_attempt_number(run)):
            state = events.state(events.read(run))
            if state in ("failed", "stopped") or (run.stop_file.exists() and not events.is_end_state(state)):
                attempt_numbers[name] = number
    return attempt_numbers


def _active_order(sweep_dir: SweepDir) -> SweepOrder | None:
    """Return the newest order of a sweep if its job is still alive and the sweep is not stopped; None otherwise."""
    try:
        order = sweep_dir.read_order(sweep_dir.order_names()[-1]) if sweep_dir.exists else None
        return order if order and not sweep_dir.stop_file.exists() and is_alive(order) else None
    except StorageError:
        raise
    except MhmoeError:
        # The order's cluster does not answer, so the order counts as inactive. If its job is still alive, the job will
        # end when it sees a newer order.
        return None


def is_alive(order: SweepOrder) -> bool:
    """Return whether the job of an order is pending or running; no answer is a ClusterError."""
    return jobs.is_alive(connect_recorded(order.address), order.job)


def logged_error(order: SweepOrder) -> MhmoeError | None:
    """Return the error that an order's job logged at its end; None without one, or if the cluster lacks the job."""
    connection = connect_recorded(order.address)
    if jobs.info(connection, order.job) is None:
        return None
    return logged(jobs.logs(connection, order.job))


def stop(sweep_dir: SweepDir) -> tuple[dict[str, events.State], list[MhmoeError]]:
    """Stop a sweep: runs that train stop after a checkpoint, runs that do not train yet end at once, no others start.

    Return the states that unfinished runs had before, by name, and an error for each cluster that did not answer, whose
    workers learn of the stop from their run directory. A sweep that does not exist is a RunError.
    """
    if not sweep_dir.exists:
        raise RunError(f"sweep {sweep_dir.name}", "it was never started", "start it first")
    # The stop file is created before any job is ended, because a command that follows the sweep would otherwise start
    # an ended job again.
    with report_write_errors(sweep_dir.stop_file):
        sweep_dir.stop_file.touch()
    cluster_errors = _end_jobs(sweep_dir)
    running: dict[str, events.State] = {}
    for name, run in sweep_dir.runs().items():
        state = events.state(events.read(run))
        if newest_attempt_number(run) and not events.is_end_state(state):
            run.request_stop()
            running[name] = state
    for name, state in running.items():
        if state != "running":
            try:
                _end_run(sweep_dir.runs()[name])
            except MhmoeError as e:
                cluster_errors.setdefault(last_attempt(sweep_dir.runs()[name]).address, e)
    return running, list(cluster_errors.values())


def _end_jobs(sweep_dir: SweepDir) -> dict[str, MhmoeError]:
    """End the jobs of all orders; even an earlier order's job may be preparing data, and would then start a run.

    Return the error of the last order's cluster by its address, if there is one; earlier clusters may be long gone.
    """
    cluster_errors: dict[str, MhmoeError] = {}
    last_address = ""
    for order in sweep_dir.earlier_orders():
        last_address = order.address
        if order.address not in cluster_errors:
            try:
                connection = connect_recorded(order.address)
                if jobs.is_alive(connection, order.job):
                    jobs.stop(connection, order.job)
                    while jobs.is_alive(connection, order.job):
                        time.sleep(POLL_SECONDS)
            except MhmoeError as e:
                cluster_errors[order.address] = e
    return {last_address: cluster_errors[last_address]} if last_address in cluster_errors else {}


def _end_run(run: RunDir) -> None:
    """End the job of a run at once, wait until it has ended, and record its end if the job did not do so."""
    attempt = last_attempt(run)
    connection = connect_recorded(attempt.address)
    if jobs.is_alive(connection, attempt.job):
        jobs.stop(connection, attempt.job)
    while (run_outcome := outcome(run, connection)) is None:
        time.sleep(POLL_SECONDS)
    if recorded_outcome(events.read(run)) is None:
        if run_outcome.state == "stopped":
            events.record(run, "stopped", reason="its job was ended")
        else:
            events.record(run, "failed", reason=run_outcome.reason)
