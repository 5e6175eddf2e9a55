"""Which runs of a sweep start when: so many at a time, each as a job of its own."""

import time

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.cluster.patience import Patience
from mhmoe_ray.cluster.run_outcome import Outcome, outcome_or_gone, recorded_outcome
from mhmoe_ray.cluster.run_start import start_attempt
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.shards.manifest import PreparedAs, prepared_as
from mhmoe_ray.errors import ClusterError, MhmoeError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.attempts import read_attempts
from mhmoe_ray.runs.layout import RunDir, create_run
from mhmoe_ray.runs.sweeps import Order, SweepDir
from mhmoe_ray.spec import SweepRun

POLL_SECONDS = 2.0
MOST_STARTS = 3
"""Of one run by one job, where the run's job was killed before it could say how the run ended."""


class Sweep:
    def __init__(self, place: SweepDir, name: str, connection: Connection) -> None:
        """Args:
        place: its directory.
        name: of the order that this job is for.
        connection: to the cluster, from within it.
        """
        self._place, self._name, self._connection = place, name, connection
        self._order = place.order(name)
        self._entries = self._order.wanted_entries
        self._runs: dict[str, RunDir] = {}
        self._starts: dict[str, int] = {}
        self._over: set[str] = set()
        self._why_not: dict[PreparedAs, MhmoeError | None] = {}
        self._patience = Patience(_say)

    def run(self) -> None:
        """Until every run is over, no more are to start, or another job does this.

        Raises:
            MhmoeError: the text of some runs could not be prepared; all others had their turn.
        """
        self._wait_for_earlier_jobs()
        self._runs = dict(self._place.runs())
        if not self._order.retry:
            self._over |= {name for name, run in self._runs.items() if _is_recorded(run)}
        while self._is_its_turn and any(entry.name not in self._over for entry in self._entries):
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
            time.sleep(POLL_SECONDS)
        for error in filter(None, self._why_not.values()):
            raise error

    @property
    def _is_its_turn(self) -> bool:
        return not self._place.stop_file.exists() and self._place.orders()[-1] == self._name

    def _wait_for_earlier_jobs(self) -> None:
        """They end as soon as they see this order, but may be starting a run. Whom nobody can ask is not waited for."""
        silent: set[str] = set()
        names = self._place.orders()
        for order in map(self._place.order, names[: names.index(self._name)]):
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
        """Whether a job of it goes on; what is over for good is remembered."""
        run = self._runs[name]
        if name in self._over or not run.spec_file.exists() or not read_attempts(run):
            return False
        try:
            over = self._outcome(run)
        except ClusterError as e:
            _say(f"{name}: {e}")
            return True
        if over is None:
            if not (self._order.retry and name not in self._starts and run.stop_file.exists()):
                self._starts.setdefault(name, 0)  # by another job, but its end is for this one to see
            return True
        if name not in self._order.wanted:
            self._over.add(name)
        elif over.state == "finished" or (name in self._starts and not self._was_killed(run, name, over)):
            self._over.add(name)
            _say(f"{name}: {over.state} {over.reason}".rstrip())
        return False

    def _outcome(self, run: RunDir) -> Outcome | None:
        """As its own cluster says, which need not be this one, nor be there any more."""
        own = self._order.address
        return outcome_or_gone(run, lambda address: self._connection if address == own else connect(address))

    def _was_killed(self, run: RunDir, name: str, over: Outcome) -> bool:
        """Its job ended without a word, and is to be started again."""
        said = recorded_outcome(events.events(run))
        return over.state == "failed" and said is None and self._starts[name] < MOST_STARTS

    def _is_prepared(self, entry: SweepRun) -> bool:
        """Make the text of a run ready before any run with that text starts: two would do it at the same time. Why that
        cannot be is said at once, but does not end this job, which goes on with other text."""
        text = prepared_as(entry.spec)
        if text not in self._why_not:
            self._why_not[text] = None
            try:
                prepare(entry.spec)
            except MhmoeError as e:
                _say(f"{entry.name}: {e}")
                self._why_not[text] = e
        return self._why_not[text] is None

    def _start(self, entry: SweepRun) -> bool:
        run = self._runs.get(entry.name)
        if run is None or not run.spec_file.exists():  # it may have been removed meanwhile
            run = create_run(entry.spec)
            self._runs = {**self._place.runs(), entry.name: run}
            self._place.write_runs(self._runs)
        elif other := entry.spec.changed_from(run.spec()):
            _say(f"{entry.name}: it was started with another spec: {', '.join(other)}")
            self._over.add(entry.name)
            return False
        else:
            run.write_spec(entry.spec)  # where it computes may have changed
        self._starts[entry.name] = self._starts.get(entry.name, 0) + 1
        run.stop_file.unlink(missing_ok=True)
        try:
            job = start_attempt(run, entry.spec, self._connection, known_as=self._order.address)
        except MhmoeError as e:
            _say(f"{entry.name}: {e}")
            self._over.add(entry.name)
            return False
        _say(f"{entry.name}: run {run.id}, job {job}")
        return True


def _say(line: str) -> None:
    print(line, flush=True)


def _is_recorded(run: RunDir) -> bool:
    """Whether it failed or was stopped, by its own account."""
    return events.state(events.events(run)) in ("failed", "stopped")
