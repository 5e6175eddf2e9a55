"""Attempts of a run, each of which is one job on a cluster: start, resume or stop one, and wait for its end."""

import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial

from mhmoe_ray.api.connection import connect_to_train
from mhmoe_ray.api.defaults import OnNote, default_storage, ignore_note
from mhmoe_ray.api.trust import require_submitted_settings
from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import LOCAL, Connection, connect_recorded, require_known
from mhmoe_ray.cluster.dashboard import RetryingCaller, is_loopback
from mhmoe_ray.cluster.runs import (
    QUIET_SECONDS,
    Outcome,
    RunEvents,
    applications_at,
    outcome,
    outcome_or_lost,
    recorded_outcome,
    seconds_since_write,
    start_attempt,
)
from mhmoe_ray.cluster.submissions import record_settings
from mhmoe_ray.errors import ClusterError, JobError, RunError, SpecError, TokenError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, RunDir, create_run, last_attempt
from mhmoe_ray.spec import RunSpec, apply_overrides, load_resolved_spec, parse_overrides, validate_section
from mhmoe_ray.storage import location

POLL_SECONDS = 0.5
"""Seconds between two reads of the run directory, while a caller waits for the end of the run."""
CLUSTER_POLL_SECONDS = 5.0
"""Seconds between two requests to the cluster, while a caller waits for the end of a run.

Requests are rarer than reads of the run directory, because that usually shows the end first.
"""
DASHBOARD_WAIT_SECONDS = 60.0
"""Timeout in seconds for the Ray dashboard's answer to whether a run is served, before the run is removed.

It is long because a run that is served must not be removed: its replicas would lose the files.
"""


def run_argument(run: RunDir) -> str:
    """Return the argument with which users name a run in a command.

    It is the run's id if the run is in the storage folder that commands use by default, else its path.
    """
    storage_folder = location(default_storage()).absolute()
    # The path is quoted, because messages show commands with it, which users paste into a shell.
    return run.id if run.path.parent == storage_folder else shlex.quote(str(run.path))


def start_run(spec: RunSpec, address: str | None = None, on_note: OnNote = ignore_note) -> tuple[RunDir, Connection]:
    """Create the directory of a new run, and start its first attempt as a job on a cluster.

    The caller has checked the spec and its data with `connection.check_training`.

    Args:
        spec: spec of the run.
        address: address of the cluster; None for the default cluster.
        on_note: callback that gets lines of text about the progress.

    Returns:
        The run, and the connection to its cluster.

    Raises:
        ClusterError, SpecError: the cluster cannot be reached or cannot hold the run (see `connect_to_train`).
        JobError: the cluster does not accept the job.
        StorageError: the run directory cannot be written.
    """
    connection = connect_to_train(spec, address, on_note)
    run = create_run(spec)
    _submit_attempt(run, spec, connection, on_note)
    return run, connection


def restart_run(run: RunDir, spec: RunSpec, address: str | None = None, on_note: OnNote = ignore_note) -> Connection:
    """Start the next attempt of a run that has ended, and return the connection to its cluster.

    Args:
        run: a run that is over.
        spec: the run's spec, whose cluster section and number of steps may have changed; it is written to the run
            directory.
        address: address of the cluster; None for the default cluster.
        on_note: callback that gets lines of text about the progress.

    Raises:
        ClusterError, SpecError: the cluster cannot be reached or cannot hold the run (see `connect_to_train`).
        JobError: the cluster does not accept the job.
        StorageError: the run directory cannot be written.
    """
    connection = connect_to_train(spec, address, on_note)
    run.write_spec(spec)
    run.clear_stop()
    _submit_attempt(run, spec, connection, on_note)
    return connection


def _submit_attempt(run: RunDir, spec: RunSpec, connection: Connection, on_note: OnNote) -> None:
    """Submit the next attempt of a run as a job on the cluster, and report the run, the job and the dashboard's URL."""
    record_settings(spec)
    job = start_attempt(run, spec, connection)
    on_note(f"run {run.id}  job {job}  dashboard {connection.address}")


def resume_run(
    run: RunDir,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    *,
    force: bool = False,
    trust_run: bool = False,
    on_note: OnNote = ignore_note,
) -> Connection:
    """Resume a run that has ended from its newest complete checkpoint, and return the connection to its cluster.

    Args:
        run: the run to resume.
        steps: number of steps up to which the run trains; None for the number in its spec.
        overrides: `key.path=value` strings that change keys of the spec's cluster section.
        address: address of the cluster; None for the cluster of the last attempt.
        force: whether to treat a cluster that does not answer as gone, even if the run wrote something a moment ago.
        trust_run: whether to use settings of the run's spec that run code, even if this user never submitted them.
        on_note: callback that gets lines of text about the progress.

    Raises:
        RunError: the run is running, may still be running, is finished, was imported, or cannot have so many steps.
        SpecError: an override is wrong, or changes a key outside of the cluster section; or the run is not trusted.
        ClusterError, JobError: the cluster cannot hold the run, or does not accept its job.
    """
    for keys, _ in parse_overrides(overrides):
        if keys[0] != "cluster":
            reason = "a resumed run must go on exactly as it would have"
            fix = "change only cluster keys, or submit a run that starts from this one (start.from)"
            raise SpecError(f"override {'.'.join(keys)}", reason, fix)
    previous_attempt = last_attempt(run)
    run_outcome = final_outcome(run, force, given_addresses=[address] if address else [])
    if run_outcome.state == "finished" and steps is None:
        fix = f"train it longer: `mhmoe resume {run_argument(run)} --until STEPS`"
        raise RunError(f"run {run.id}", "it is finished", fix)
    spec = load_resolved_spec(run.spec_file)
    if not trust_run:
        require_submitted_settings(run, spec)
    changed_tree = apply_overrides(spec.model_dump(mode="json"), overrides)
    spec = run.relocated_spec(validate_section(RunSpec, changed_tree, f"spec {run.spec_file}"))
    if steps is not None:
        spec = _extended_spec(run, spec, steps, on_note)
    return restart_run(run, spec, address or require_known(attempt_address(previous_attempt)), on_note)


def _extended_spec(run: RunDir, spec: RunSpec, steps: int, on_note: OnNote) -> RunSpec:
    """Return a run's spec with `steps` steps, changed so that the steps before the old end stay the same.

    Raises:
        RunError: the spec has at least as many steps already, or its order of samples depends on the number of steps.
    """
    train = spec.train
    if steps <= train.steps:
        fix = "give a larger number; a run with fewer steps ends by `mhmoe stop`"
        raise RunError(f"run {run.id}", f"its spec has {train.steps:,} steps already", fix)
    if any(source.max_epochs is not None or source.max_epochs_of for source in spec.data.sources.values()):
        reason = "its sources have max_epochs, so the order of its samples depends on the number of steps"
        fix = f"submit a branch: start: {{from: {run.id}, optimizer: true, order: continue}}"
        raise RunError(f"run {run.id}", reason, fix)
    changes: dict[str, int] = {"steps": steps}
    if train.schedule != "constant":
        changes["schedule_steps"] = train.last_decay_step
        on_note(
            f"the learning rate stays at {train.min_lr:g} after step {train.last_decay_step:,}; for another schedule, "
            "submit a branch that starts from an earlier checkpoint (start.from: RUN@STEP)"
        )
    return spec.model_copy(update={"train": train.model_copy(update=changes)})


def attempt_address(attempt: Attempt) -> str:
    """Return the cluster of an attempt in the form that --address takes: its URL, or the name of the local cluster."""
    # A local cluster that was restarted has another address but the same name, so its name is returned.
    return LOCAL if attempt.local else attempt.address


def final_outcome(
    run: RunDir,
    force: bool = False,
    *,
    is_patient: bool = False,
    given_addresses: Sequence[str] = (),
    on_note: OnNote = ignore_note,
) -> Outcome:
    """Return how a run ended; raise an error if it has not ended.

    A run also counts as failed if its cluster does not answer and it has written nothing for `QUIET_SECONDS`.

    Args:
        run: the run that should be over.
        force: whether to treat a cluster that does not answer as gone, even if the run wrote something a moment ago.
        is_patient: whether to wait, if the cluster does not answer, until the run has written nothing for a while.
        given_addresses: addresses of clusters that the user gave to this command.
        on_note: callback that gets a line of text about such a wait.

    Raises:
        RunError: the run is running, or may still be running.
        TokenError: its cluster requires a token that this machine does not have, so its state is unknown.
    """
    while True:
        try:
            run_outcome = outcome_or_lost(run, partial(connect_recorded, given_addresses=given_addresses))
        # A TokenError is also a ClusterError, but its cluster answers and may still train the run. The run must not
        # count as lost, so the error is raised again.
        except TokenError:
            raise
        except ClusterError as e:
            if force:
                return Outcome("failed", f"its cluster does not answer any more ({e.reason})")
            quiet_seconds = seconds_since_write(run)
            if not is_patient:
                reason = f"its cluster does not answer ({e.reason}), but it wrote something {quiet_seconds:.0f} s ago"
                fix = "make sure that no job of it runs any more, then wait, or force it"
                raise RunError(f"run {run.id}", reason, fix) from e
            on_note(f"waiting: its cluster does not answer, but it wrote something {quiet_seconds:.0f} s ago")
            time.sleep(max(0.0, QUIET_SECONDS - quiet_seconds))
            continue
        if run_outcome is None:
            fix = f"see `mhmoe status {run_argument(run)}`, or end it first: mhmoe stop {run_argument(run)}"
            raise RunError(f"run {run.id}", "it is still running", fix)
        return run_outcome


def check_removable(run: RunDir, force: bool = False) -> None:
    """Raise an error if a run must not be removed, because it may run or is served.

    Raises:
        RunError: the run is running, is served, or (unless `force`) may still be running or served.
        TokenError: a cluster of the run requires a token that this machine does not have, so its state is unknown.
    """
    final_outcome(run, force)
    for address in {address for address, _ in events.deployments(events.read(run))}:
        try:
            served = applications_at(run, address, DASHBOARD_WAIT_SECONDS)
        except TokenError:
            raise
        except ClusterError as e:
            # A cluster of this machine that does not answer has ended, and a cluster elsewhere may be out of reach.
            if force or is_loopback(address):
                continue
            reason = f"cluster {address}, on which it was served, does not answer ({e.reason})"
            raise RunError(f"run {run.id}", reason, "make sure that it is not served any more, then force it") from e
        for application in served:
            raise RunError(
                f"run {run.id}",
                f"it is served at {application['url']}",
                f"stop serving it first: mhmoe serve down {application['application']}",
            )


def stop_run(run: RunDir, end_immediately: bool = False, on_note: OnNote = ignore_note) -> Outcome | None:
    """Stop a run and wait until it is over: its workers finish their step, validate and save a checkpoint.

    If its workers are not training yet, its job is ended at once.

    Args:
        run: the run to stop.
        end_immediately: whether to end its job at once, without a last checkpoint.
        on_note: callback that gets a line of text about what this call waits for.

    Returns:
        How the run ended; None if the workers are asked to stop but this machine cannot see whether they do, because
        the cluster does not answer.

    Raises:
        RunError: the run is over already, or was imported.
        ClusterError: the cluster does not answer, and the run can be stopped only by ending its job.
        TokenError: the cluster asks for another token.
        StorageError: the run directory cannot be written.
    """
    attempt = last_attempt(run)
    run_events = events.read(run)
    run_outcome = recorded_outcome(run_events)
    if run_outcome:
        raise RunError(f"run {run.id}", f"it is {run_outcome.state} already", "see `mhmoe status`")
    is_training = events.state(run_events) == "running"
    try:
        connection = connect_recorded(attempt.address)
    # A TokenError is also a ClusterError, but here the cluster answers. It is raised again, so that the user gives the
    # cluster's token.
    except TokenError:
        raise
    except ClusterError as e:
        if end_immediately or not is_training:
            raise
        # The cluster may run within a batch job, where no client can reach it. The workers still read the run
        # directory, so the stop file there stops them.
        run.request_stop()
        on_note(
            f"its workers are asked to stop through its directory; this machine cannot see whether they do: {e.reason}"
        )
        return None
    run.request_stop()
    # Connecting may have taken long, so the state of the run is read again.
    if end_immediately or events.state(events.read(run)) != "running":
        jobs.stop(connection, attempt.job)
    else:
        on_note("waiting for its last checkpoint; `mhmoe stop --now` ends it without one")
    retrying_caller = RetryingCaller(on_note)
    while (run_outcome := retrying_caller.call(lambda: outcome(run, connection), None)) is None:
        time.sleep(POLL_SECONDS)
    # If Ray ended the job, the job's driver could not record the end of the run, so this process records it.
    if run_outcome.state == "stopped" and recorded_outcome(events.read(run)) is None:
        events.record(run, "stopped", reason="its job was ended")
    return run_outcome


def wait_for_outcome(
    run: RunDir,
    connect_to_run: Callable[[], Connection],
    read_events: Callable[[], RunEvents],
    *,
    on_poll: Callable[[], None] = lambda: None,
    timeout: float | None = None,
    is_endless: bool = False,
    on_note: OnNote = ignore_note,
) -> Outcome:
    """Wait until a run is over, and return how it ended.

    Args:
        run: the run to wait for.
        connect_to_run: function that connects to the cluster of the run's newest job.
        read_events: function that returns the run's events up to now, or those of its newest attempt. It is called
            again if the storage does not answer.
        on_poll: function that is called each time after the events are read.
        timeout: timeout in seconds; None to wait without a limit.
        is_endless: whether to retry forever if the cluster or the storage does not answer.
        on_note: callback that gets a line of text if the cluster or the storage does not answer for now.

    Raises:
        ClusterError, StorageError: the cluster or the storage has not answered for a while.
        TimeoutError: the run is not over when the timeout ends.
    """
    # A failed request is repeated, because the run goes on even while its cluster or storage does not answer. The
    # storage and the cluster have a `RetryingCaller` each, which measures how long that service alone has not answered.
    start_time = query_time = time.monotonic()
    storage_caller, cluster_caller = (RetryingCaller(on_note, is_endless=is_endless) for _ in range(2))
    while True:
        run_outcome = recorded_outcome(storage_caller.call(read_events, []))
        on_poll()
        if run_outcome is None and time.monotonic() - query_time > CLUSTER_POLL_SECONDS:
            run_outcome = cluster_caller.call(lambda: outcome(run, connect_to_run()), None)
            query_time = time.monotonic()
        if run_outcome:
            return run_outcome
        if timeout is not None and time.monotonic() - start_time > timeout:
            raise TimeoutError(f"run {run.id} is not over after {timeout:g} s")
        time.sleep(POLL_SECONDS)


def failure_error(run: RunDir, run_outcome: Outcome) -> JobError:
    """Return the error about a run that failed, with the reason that its outcome records."""
    name = run_argument(run)
    return JobError(f"run {run.id}", run_outcome.reason, f"see `mhmoe logs {name}`, then `mhmoe resume {name}`")
