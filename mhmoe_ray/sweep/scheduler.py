"""Scheduler of a sweep: it starts training runs, each as a Ray job of its own, and a limited number at a time."""

import time
from collections.abc import Sequence
from functools import partial

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect_recorded
from mhmoe_ray.cluster.dashboard import RetryingCaller
from mhmoe_ray.cluster.runs import (
    QUIET_SECONDS,
    Outcome,
    outcome,
    outcome_or_lost,
    recorded_outcome,
    seconds_since_write,
    start_attempt,
)
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.shards.recipe import PreparedKey, prepared_key
from mhmoe_ray.errors import ClusterError, MhmoeError, SpecError, StorageError, TokenError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, create_run, last_attempt, newest_attempt_number
from mhmoe_ray.runs.sweeps import SweepDir, SweepOrder
from mhmoe_ray.spec import RunSpec, SweepRun
from mhmoe_ray.sweep.plan import start_names, with_run_paths

POLL_SECONDS = 2.0
STORAGE_SECONDS = 3600.0
"""Seconds for which the storage may fail without interruption, so that a sweep of weeks survives an outage."""
MAX_STARTS = 3
"""Largest number of times that a run is started, if its jobs are killed before they record how the run ended."""


class Sweep:
    """Scheduler of one order of a sweep, with a connection to the cluster from within it."""

    def __init__(
        self, sweep_dir: SweepDir, name: str, connection: Connection, known_addresses: Sequence[str] = ()
    ) -> None:
        self._connect = partial(connect_recorded, given_addresses=known_addresses)
        self._sweep_dir, self._name, self._connection = sweep_dir, name, connection
        self._order = sweep_dir.read_order(name)
        self._entries = self._order.wanted_entries
        self._runs: dict[str, RunDir] = {}
        self._starts: dict[str, int] = {}
        self._settled: set[str] = set()
        self._preparation_errors: dict[PreparedKey, MhmoeError | None] = {}
        self._token_errors: list[TokenError] = []
        """Errors of clusters that refuse this job's token, so that the job cannot find out how their runs ended."""
        self._retrying_caller = RetryingCaller(_print_line)
        self._is_started = False
        self._storage_failure_start: float | None = None
        """Time since which the storage fails, by the monotonic clock; None while the storage works."""

    def run(self) -> None:
        """Start runs until all have ended, the sweep is stopped, or a newer job takes over.

        Then raise the error of data that could not be prepared, or of a cluster that refuses to tell how runs ended.
        Storage that fails for more than `STORAGE_SECONDS` is a StorageError.
        """
        while self._has_more_work():
            time.sleep(POLL_SECONDS)
        for error in [*filter(None, self._preparation_errors.values()), *self._token_errors]:
            raise error

    def _has_more_work(self) -> bool:
        """Poll all runs once, and return whether there is more to do."""
        try:
            if not self._is_started:
                self._wait_for_earlier_jobs()
                self._runs = dict(self._sweep_dir.runs())
                self._is_started = True
            if not self._is_newest_order or all(entry.name in self._settled for entry in self._entries):
                return False
            self._check_runs()
            self._storage_failure_start = None
        except (OSError, StorageError) as e:
            if self._storage_failure_start is None:
                _print_line(f"the storage fails; trying again: {e}")
                self._storage_failure_start = time.monotonic()
            elif time.monotonic() - self._storage_failure_start > STORAGE_SECONDS:
                raise StorageError(
                    f"sweep {self._sweep_dir.name}", str(e), "repair the storage, then give the command again"
                ) from e
        return True

    def _check_runs(self) -> None:
        alive = {name for name in self._runs if self._is_alive(name)}
        for entry in self._entries:
            if len(alive) >= self._order.concurrent:
                break
            if entry.name in self._settled | alive or self._must_wait(entry):
                continue
            if not self._is_prepared(entry):
                self._settled.add(entry.name)
            # Preparing the data may take long. If another command has written a newer order (request to start runs)
            # meanwhile, that order's job starts runs, not this one.
            elif not self._is_newest_order:
                break
            elif self._start(entry):
                alive.add(entry.name)

    @property
    def _is_newest_order(self) -> bool:
        """True if this job may start runs: the sweep is not stopped, and has no newer order."""
        return not self._sweep_dir.stop_file.exists() and self._sweep_dir.order_names()[-1] == self._name

    def _wait_for_earlier_jobs(self) -> None:
        """Wait until earlier orders' jobs, which may be starting a run, have ended or their clusters do not answer."""
        silent: set[str] = set()
        for order in self._sweep_dir.earlier_orders(self._name):
            while self._is_newest_order and order.address not in silent:
                try:
                    if not self._is_job_alive(order):
                        break
                except ClusterError as e:
                    _print_line(f"an earlier job of this sweep may still start runs there: {e}")
                    silent.add(order.address)
                time.sleep(POLL_SECONDS)

    def _is_job_alive(self, order: SweepOrder) -> bool:
        """Return whether the job of an order is alive; True even while this job's own cluster does not answer."""
        if order.address != self._order.address:
            return jobs.is_alive(self._connect(order.address), order.job)
        return self._retrying_caller.call(lambda: jobs.is_alive(self._connection, order.job), True)

    def _is_alive(self, name: str) -> bool:
        """Return whether a run is alive; mark one that has ended for good as settled, so that it is not started again.

        A run whose cluster does not answer counts as alive. So does one whose cluster refuses the token, until it has
        written nothing for `QUIET_SECONDS`.
        """
        run = self._runs[name]
        if name in self._settled or not run.spec_file.exists() or not newest_attempt_number(run):
            return False
        try:
            run_outcome = self._outcome(run)
        except TokenError as e:
            if seconds_since_write(run) < QUIET_SECONDS:
                return True
            self._settled.add(name)
            self._token_errors += [e] if name in self._order.wanted else []
            return False
        except ClusterError as e:
            _print_line(f"{name}: {e}")
            return True
        if run_outcome is None:
            return True
        if name not in self._order.wanted:
            self._settled.add(name)
        elif run_outcome.state == "finished" or not self._should_restart(name, run_outcome):
            self._settled.add(name)
            _print_line(f"{name}: {run_outcome.state} {run_outcome.reason}".rstrip())
        return False

    def _outcome(self, run: RunDir) -> Outcome | None:
        """Return how a run ended; None while it runs. The run's cluster may differ from this job's, or be gone."""
        if known_outcome := recorded_outcome(events.read(run)):
            return known_outcome
        attempt = last_attempt(run)
        # If the addresses differ, the attempt may still be on this cluster, because the recorded address may be one
        # that works only from outside of it. This cluster is therefore asked first whether it knows the job.
        if attempt.address != self._order.address and jobs.info(self._connection, attempt.job) is None:
            return outcome_or_lost(run, self._connect)
        return self._retrying_caller.call(lambda: outcome(run, self._connection), None)

    def _should_restart(self, name: str, run_outcome: Outcome) -> bool:
        """Return whether to restart a run that ended without finishing.

        This holds if it ended before the order was written, or if its job died without recording the end and this job
        has started the run fewer than `MAX_STARTS` times.
        """
        run = self._runs[name]
        if newest_attempt_number(run) <= self._order.retry.get(name, 0):
            return True
        known_outcome = recorded_outcome(events.read(run))
        return run_outcome.state == "failed" and known_outcome is None and self._starts.get(name, 0) < MAX_STARTS

    def _must_wait(self, entry: SweepRun) -> bool:
        """Return whether a run waits for runs from which it starts; if one of them cannot finish, it never starts."""
        for name in start_names(entry):
            run = self._runs.get(name)
            if run is not None and newest_attempt_number(run) and events.state(events.read(run)) == "finished":
                continue
            if name in self._settled or name not in self._order.wanted:
                reason = "has not finished" if name in self._settled else "is not among the runs to start"
                _print_line(f"{entry.name}: {name}, from which it starts, {reason}")
                self._settled.add(entry.name)
            return True
        return False

    def _is_prepared(self, entry: SweepRun) -> bool:
        """Prepare a run's data if they are missing; a failure is printed and excludes all runs that read these data."""
        # The data are prepared before any run that reads them starts, because two runs would otherwise prepare them at
        # the same time.
        text = prepared_key(entry.spec)
        if text not in self._preparation_errors:
            try:
                prepare(entry.spec)
                self._preparation_errors[text] = None
            except MhmoeError as e:
                # The caller would take a StorageError of the data for a failure of the run directories, and poll again.
                # The error is caught here, because otherwise the preparation, which may take a day, would be repeated.
                self._preparation_errors[text] = e
            if self._preparation_errors[text]:
                _print_line(f"{entry.name}: {self._preparation_errors[text]}")
        return self._preparation_errors[text] is None

    def _start(self, entry: SweepRun) -> bool:
        """Start a run and return whether it may be alive; a refused run or one with another spec is never retried."""
        run = self._runs.get(entry.name)
        try:
            spec = with_run_paths(entry, self._runs)
            group = spec.tracking.group or self._sweep_dir.name
            spec = spec.model_copy(update={"tracking": spec.tracking.model_copy(update={"group": group})})
        except MhmoeError as e:
            _print_line(f"{entry.name}: {e}")
            self._settled.add(entry.name)
            return False
        # A run directory is missing if the user has removed it. The run is then created again.
        if run is None or not run.spec_file.exists():
            run = _create_run(spec)
            runs = {**self._sweep_dir.runs(), entry.name: run}
            # The run is recorded before it starts, because a later poll, or another job, would otherwise create it
            # again.
            self._sweep_dir.write_runs(runs)
            self._runs = runs
        elif newest_attempt_number(run) and (changed_keys := spec.changed_keys(run.spec())):
            _print_line(f"{entry.name}: it was started with another spec: {', '.join(changed_keys)}")
            self._settled.add(entry.name)
            return False
        starts = self._starts.get(entry.name, 0) + 1
        try:
            job = start_attempt(run, spec, self._connection, public_address=self._order.address)
        except ClusterError as e:
            # The cluster may have accepted the job even though it did not answer, so the run may be alive. The next
            # poll shows that.
            _print_line(f"{entry.name}: {e}")
            self._starts[entry.name] = starts
            return True
        except StorageError:
            raise
        except MhmoeError as e:
            _print_line(f"{entry.name}: {e}")
            self._settled.add(entry.name)
            return False
        self._starts[entry.name] = starts
        _print_line(f"{entry.name}: run {run.id}, job {job}")
        return True


def _create_run(spec: RunSpec) -> RunDir:
    """Create the directory of a run; a failing storage, which may recover, is an OSError or StorageError."""
    try:
        return create_run(spec)
    except SpecError as e:
        if isinstance(e.__cause__, OSError):
            raise e.__cause__ from None
        raise


def _print_line(line: str) -> None:
    print(line, flush=True)
