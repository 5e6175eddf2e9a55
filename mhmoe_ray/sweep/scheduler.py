"""Scheduler of a sweep: which runs start when, a limited number at a time, each as a job of its own."""

import time

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.cluster.dashboard import Patience
from mhmoe_ray.cluster.runs import (
    QUIET_SECONDS,
    Outcome,
    outcome,
    outcome_or_gone,
    quiet,
    recorded_outcome,
    start_attempt,
)
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.shards.manifest import PreparedAs, prepared_as
from mhmoe_ray.errors import ClusterError, MhmoeError, SpecError, StorageError, TokenError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, create_run, last_attempt, newest_number
from mhmoe_ray.runs.sweeps import Order, SweepDir
from mhmoe_ray.spec import SweepRun

POLL_SECONDS = 2.0
STORAGE_SECONDS = 3600.0
"""Seconds for which the storage may fail without interruption."""
MOST_STARTS = 3
"""Largest number of starts of a run by one job, if the run's job is killed before it records how the run ended."""


class Sweep:
    def __init__(self, place: SweepDir, name: str, connection: Connection) -> None:
        """Read an order.

        Args:
            place: the sweep's directory.
            name: the name of the order that this job is for.
            connection: the cluster, as reached from within it.
        """
        self._place, self._name, self._connection = place, name, connection
        self._order = place.order(name)
        self._entries = self._order.wanted_entries
        self._runs: dict[str, RunDir] = {}
        self._starts: dict[str, int] = {}
        self._over: set[str] = set()
        self._why_not: dict[PreparedAs, MhmoeError | None] = {}
        self._locked: list[TokenError] = []
        """Errors of clusters that refuse the token, so that the end of a run is not known, and never will be here."""
        self._patience = Patience(_say)
        self._begun = False
        self._fails_since: float | None = None
        """Time since which the storage has failed without interruption, by the monotonic clock; None while it works."""

    def run(self) -> None:
        """Run until every run is over, no more are to start, or another job takes over.

        Raises:
            MhmoeError: the text of some runs could not be prepared, or the cluster that some ran on does not tell how
                they ended; all other runs had their turn. Or the storage failed for too long.
        """
        while self._goes_on():
            time.sleep(POLL_SECONDS)
        for error in [*filter(None, self._why_not.values()), *self._locked]:
            raise error

    def _goes_on(self) -> bool:
        """Poll all runs once, and return whether there is more to do.

        A storage that fails is tried again for `STORAGE_SECONDS`: in the weeks that a sweep takes it may be out of
        reach.

        Raises:
            StorageError: the storage has failed for longer.
        """
        try:
            if not self._begun:
                self._wait_for_earlier_jobs()
                self._runs = dict(self._place.runs())
                self._begun = True
            if not self._is_its_turn or all(entry.name in self._over for entry in self._entries):
                return False
            self._look()
            self._fails_since = None
        except (OSError, StorageError) as e:
            if self._fails_since is None:
                _say(f"the storage fails, and is asked again: {e}")
                self._fails_since = time.monotonic()
            elif time.monotonic() - self._fails_since > STORAGE_SECONDS:
                raise StorageError(f"sweep {self._place.name}", str(e), "mend the storage, then give it again") from e
        return True

    def _look(self) -> None:
        """Check all runs, and start those whose turn it is."""
        alive = {name for name in self._runs if self._is_alive(name)}
        for entry in self._entries:
            if len(alive) >= self._order.concurrent:
                break
            if entry.name in self._over | alive:
                continue
            if not self._is_prepared(entry):
                self._over.add(entry.name)
            elif not self._is_its_turn:  # asked last: preparing takes long
                break
            elif self._start(entry):
                alive.add(entry.name)

    @property
    def _is_its_turn(self) -> bool:
        return not self._place.stop_file.exists() and self._place.orders()[-1] == self._name

    def _wait_for_earlier_jobs(self) -> None:
        """Wait until the jobs of earlier orders have ended.

        They end as soon as they see this order, but may be starting a run. A job whose cluster does not answer is not
        waited for.
        """
        silent: set[str] = set()
        for order in self._place.orders_before(self._name):
            while self._is_its_turn and order.address not in silent:
                try:
                    if not self._lives(order):
                        break
                except ClusterError as e:
                    _say(f"an earlier job of this sweep may still start runs there: {e}")
                    silent.add(order.address)
                time.sleep(POLL_SECONDS)

    def _lives(self, order: Order) -> bool:
        if order.address != self._order.address:
            return jobs.is_alive(connect(order.address), order.job)
        return self._patience.ask(lambda: jobs.is_alive(self._connection, order.job), True)

    def _is_alive(self, name: str) -> bool:
        """Return whether a job of the run goes on, and remember runs that are over for good.

        A run also counts as alive if its cluster does not answer.
        """
        run = self._runs[name]
        if name in self._over or not run.spec_file.exists() or not newest_number(run):
            return False
        try:
            over = self._outcome(run)
        except TokenError as e:
            if quiet(run) < QUIET_SECONDS:
                return True
            self._over.add(name)
            self._locked += [e] if name in self._order.wanted else []
            return False
        except ClusterError as e:
            _say(f"{name}: {e}")
            return True
        if over is None:
            return True
        if name not in self._order.wanted:
            self._over.add(name)
        elif over.state == "finished" or not self._is_to_start_again(name, over):
            self._over.add(name)
            _say(f"{name}: {over.state} {over.reason}".rstrip())
        return False

    def _outcome(self, run: RunDir) -> Outcome | None:
        """Return how a run ended according to its own cluster, which may be another one or gone; None if it goes on."""
        if over := recorded_outcome(events.events(run)):
            return over
        attempt = last_attempt(run)
        # This one may be known by another address there, where it cannot be reached from within.
        if attempt.address != self._order.address and jobs.status(self._connection, attempt.job) is None:
            return outcome_or_gone(run, connect)
        return self._patience.ask(lambda: outcome(run, self._connection), None)

    def _is_to_start_again(self, name: str, over: Outcome) -> bool:
        """Return whether a run that is over starts again.

        It does if it ended before the order asked for it; or if its job failed without recording that, and this job has
        started it fewer than `MOST_STARTS` times.
        """
        run = self._runs[name]
        if newest_number(run) <= self._order.retry.get(name, 0):
            return True
        said = recorded_outcome(events.events(run))
        return over.state == "failed" and said is None and self._starts.get(name, 0) < MOST_STARTS

    def _is_prepared(self, entry: SweepRun) -> bool:
        """Prepare the text of a run, and return whether that worked.

        It happens before any run with that text starts, because two runs would prepare it at the same time. A failure
        is printed at once and remembered, but does not end this job, which goes on with other text.
        """
        text = prepared_as(entry.spec)
        if text not in self._why_not:
            try:
                prepare(entry.spec)
                self._why_not[text] = None
            except MhmoeError as e:
                self._why_not[text] = e
            except OSError as e:  # not tried again by this job: it may be a day's work
                fix = "make room or mend the storage, then give the command again"
                self._why_not[text] = StorageError(f"data {entry.spec.data.prepared}", e.strerror or str(e), fix)
            if why := self._why_not[text]:
                _say(f"{entry.name}: {why}")
        return self._why_not[text] is None

    def _start(self, entry: SweepRun) -> bool:
        run = self._runs.get(entry.name)
        if run is None or not run.spec_file.exists():  # it may have been removed meanwhile
            run = _made(entry)
            runs = {**self._place.runs(), entry.name: run}
            self._place.write_runs(runs)  # before anything starts it: another look, or job, would make it anew
            self._runs = runs
        elif newest_number(run) and (other := entry.spec.changed_from(run.spec())):
            _say(f"{entry.name}: it was started with another spec: {', '.join(other)}")
            self._over.add(entry.name)
            return False
        else:
            run.write_spec(entry.spec)  # where it computes may have changed
        run.stop_file.unlink(missing_ok=True)
        starts = self._starts.get(entry.name, 0) + 1
        try:
            job = start_attempt(run, entry.spec, self._connection, known_as=self._order.address)
        except ClusterError as e:  # which may have taken it; the next look tells
            _say(f"{entry.name}: {e}")
            self._starts[entry.name] = starts
            return True
        except StorageError:
            raise
        except MhmoeError as e:
            _say(f"{entry.name}: {e}")
            self._over.add(entry.name)
            return False
        self._starts[entry.name] = starts
        _say(f"{entry.name}: run {run.id}, job {job}")
        return True


def _made(entry: SweepRun) -> RunDir:
    """Create the run of an entry.

    Raises:
        OSError: the storage fails, which may be temporary.
    """
    try:
        return create_run(entry.spec)
    except SpecError as e:
        if isinstance(e.__cause__, OSError):
            raise e.__cause__ from None
        raise


def _say(line: str) -> None:
    print(line, flush=True)
