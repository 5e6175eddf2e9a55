"""Attempts of a run, each of which is one job on a cluster: start or stop one, and wait for its end."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

from mhmoe_ray.api.connection import check_placement, connect_to_train
from mhmoe_ray.api.defaults import OnNote, ignore_note
from mhmoe_ray.api.placement import choose_at
from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import LOCAL, connect_recorded, dashboard_command
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
from mhmoe_ray.errors import ClusterError, JobError, RunError, TokenError
from mhmoe_ray.planner.adapt import changed_keys, format_keys
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.search import MEMORY_SHARE
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, RunDir, create_run, last_attempt
from mhmoe_ray.runs.jsonl import Tail
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import default_storage, location

POLL_SECONDS = 0.5
"""Seconds between two reads of the run directory, while a caller waits for the end of the run."""
CLUSTER_POLL_SECONDS = 5.0
"""Seconds between two requests to the cluster. They are rarer than reads of the run directory, which usually shows the
end first."""
DASHBOARD_WAIT_SECONDS = 60.0
"""Seconds to wait for the Ray dashboard's answer to whether a run is served. It is long because removing a served run
would take the files from its replicas."""


class RunningError(RunError):
    """An error about a run that is still running."""


def run_argument(run: RunDir) -> str:
    """Return how users name a run in a command: by its id in the default storage folder, else by its path."""
    storage_folder = location(default_storage()).absolute()
    # The path is quoted, because messages show commands with it, which users paste into a shell.
    return run.id if run.path.parent == storage_folder else shlex.quote(str(run.path))


def start_run(
    spec: RunSpec, address: str | None = None, on_note: OnNote = ignore_note, ended_run: RunDir | None = None
) -> RunDir:
    """Start the first attempt of a new run, or the next attempt of a run that has ended, and return the run.

    The caller has checked the spec and its data with `connection.check_training`. The spec of an ended run is replaced
    in its directory, as its cluster section and number of steps may have changed. Errors are those of
    `connect_to_train`, a JobError if the cluster does not accept the job, and a StorageError.
    """
    connection = connect_to_train(spec, address, on_note)
    # All keys of an ended run's spec are set, so none is chosen anew.
    spec, chosen_keys = choose_at(spec, connection)
    check_placement(spec.cluster, connection)
    if changes := changed_keys(spec, chosen_keys):
        on_note(f"chosen for its GPUs: {' '.join(format_keys(changes))}")
    memory, accelerator = compute_memory(spec).total, spec.cluster.accelerator
    if spec.cluster.gpus_per_worker and memory > MEMORY_SHARE * accelerator.memory:
        on_note(
            f"warning: a rank needs {memory / 1e9:,.1f} GB by estimate, and cluster.accelerator has "
            f"{accelerator.memory / 1e9:,.1f} GB; `mhmoe plan` names keys that save memory"
        )
    run = ended_run or create_run(spec)
    record_settings(spec)
    job = start_attempt(run, spec, connection, on_note=on_note)
    on_note(f"run {run.id}  job {job}  dashboard {connection.address} ({dashboard_command(connection.address)})")
    return run


def extended_spec(run: RunDir, spec: RunSpec, steps: int, on_note: OnNote) -> RunSpec:
    """Return a run's spec with `steps` steps, of which those before the old end stay the same; else a RunError."""
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
    """Return how a run ended; a RunError says that it is running, or may still be.

    A run also counts as failed if its cluster does not answer and it has written nothing for `QUIET_SECONDS`. If the
    cluster does not answer, `force` treats it as gone at once, and `is_patient` waits until the run has been quiet for
    so long. A TokenError leaves the state unknown: the cluster requires a token that this machine does not have.
    """
    while True:
        try:
            run_outcome = outcome_or_lost(run, partial(connect_recorded, given_addresses=given_addresses))
        # A cluster that refuses the token may still train the run, which must not count as lost.
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
            raise RunningError(f"run {run.id}", "it is still running", fix)
        return run_outcome


def check_removable(run: RunDir, force: bool = False) -> None:
    """Raise a RunError if a run runs or is served or, unless `force`, may be; a TokenError leaves this unknown."""
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
    """Stop a run, as `Run.stop` does, and return how it ended.

    The result is None if the workers are asked to stop but the cluster does not answer, so that this machine cannot see
    whether they do. Besides the errors of `Run.stop`, a TokenError or a StorageError is possible.
    """
    attempt = last_attempt(run)
    run_events = events.read(run)
    run_outcome = recorded_outcome(run_events)
    if run_outcome:
        raise RunError(f"run {run.id}", f"it is {run_outcome.state} already", "see `mhmoe status`")
    is_training = events.state(run_events) == "running"
    try:
        connection = connect_recorded(attempt.address)
    # The cluster answers a refused token, so the user has to give another one.
    except TokenError:
        raise
    except ClusterError as e:
        if end_immediately or not is_training:
            raise
        # A cluster within a batch job may be out of reach for clients, but its workers see the stop file.
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
    read_events: Callable[[], RunEvents],
    *,
    on_poll: Callable[[], None] = lambda: None,
    timeout: float | None = None,
    is_endless: bool = False,
    on_note: OnNote = ignore_note,
) -> Outcome:
    """Wait until a run is over, and return how it ended; a timeout in seconds raises a TimeoutError.

    `read_events` returns the run's events up to now, or those of its newest attempt; `on_poll` is called after each
    read. If the cluster or the storage gives no answer for a while, this raises a ClusterError or StorageError, or
    retries forever with `is_endless`.
    """
    start_time = time.monotonic()
    for run_outcome in poll_outcome(run, read_events, is_endless=is_endless, on_note=on_note):
        on_poll()
        if run_outcome:
            return run_outcome
        if timeout is not None and time.monotonic() - start_time > timeout:
            raise TimeoutError(f"run {run.id} is not over after {timeout:g} s")
    raise AssertionError("polls do not end")


def poll_outcome(
    run: RunDir, read_events: Callable[[], RunEvents], *, is_endless: bool = False, on_note: OnNote = ignore_note
) -> Iterator[Outcome | None]:
    """Yield how a run ended, from time to time, None while it goes on; arguments and errors as `wait_for_outcome`."""
    # A failed request is repeated, because the run goes on even while its cluster or storage does not answer. The
    # storage and the cluster have a `RetryingCaller` each, which measures how long that service alone has not answered.
    query_time = time.monotonic()
    connect_to_run = cache(lambda: connect_recorded(last_attempt(run).address))
    storage_caller, cluster_caller = (RetryingCaller(on_note, is_endless=is_endless) for _ in range(2))
    while True:
        run_outcome = recorded_outcome(storage_caller.call(read_events, []))
        if run_outcome is None and time.monotonic() - query_time > CLUSTER_POLL_SECONDS:
            run_outcome = cluster_caller.call(lambda: outcome(run, connect_to_run()), None)
            query_time = time.monotonic()
        yield run_outcome
        time.sleep(POLL_SECONDS)


class AttemptEvents:
    """Reader of the events of a run's newest attempt, which passes each event once to a callback."""

    def __init__(self, run: RunDir, on_event: Callable[[dict[str, Any]], object] | None) -> None:
        self._tail, self._on_event = Tail(run.events_file, events.parse), on_event
        self._events: RunEvents = []
        self._reported_count = 0

    def read(self) -> RunEvents:
        """Read the new events from the run directory, and return all events since the newest attempt was submitted."""
        self._events += self._tail.new_lines()
        if not self._reported_count:
            self._events = events.of_newest_attempt(self._events)
        return self._events

    def report(self) -> None:
        unreported_events = self._events[self._reported_count :]
        self._reported_count = len(self._events)
        if self._on_event is not None:
            for event in unreported_events:
                self._on_event(event)


def failure_error(run: RunDir, run_outcome: Outcome) -> JobError:
    """Return the error about a run that failed, with the reason that its outcome records."""
    name = run_argument(run)
    fix = f"see `mhmoe logs {name}`, then `mhmoe resume {name}`"
    if not events.has_weights(run):
        fix += ", which takes `--set KEY=VALUE` before the first step"
    return JobError(f"run {run.id}", run_outcome.reason, fix)
