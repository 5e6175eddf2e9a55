"""Which runs of a sweep start when: so many at a time, each as a job of its own."""

import time
from pathlib import Path

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.cluster.patience import Patience
from mhmoe_ray.cluster.run_outcome import Outcome, outcome_or_gone, recorded_outcome
from mhmoe_ray.cluster.run_start import start_attempt
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.errors import ClusterError, MhmoeError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.attempts import read_attempts
from mhmoe_ray.runs.layout import RunDir, create_run
from mhmoe_ray.runs.sweeps import Definition, SweepDir, SweepJob
from mhmoe_ray.spec import SweepRun

POLL_SECONDS = 2.0
MOST_STARTS = 3
"""Of one run by one job, where the run's job was killed before it could say how the run ended."""


class Sweep:
    def __init__(self, place: SweepDir, definition: Definition, job: SweepJob, connection: Connection) -> None:
        """Args:
        place: its directory.
        definition: as it stood when this job began; later ones may have been added since it was submitted.
        job: this one, of the definition's.
        connection: to the cluster, from within it.
        """
        self._place, self._job, self._connection = place, job.job, connection
        self._concurrent = definition.concurrent
        self._entries = definition.wanted_entries
        self._retry, self._address = job.retry, job.address
        before = definition.jobs[: definition.jobs.index(job)]
        self._before = [j.job for j in before if j.address == job.address]
        self._runs: dict[str, RunDir] = {}
        self._starts: dict[str, int] = {}
        self._over: set[str] = set()
        self._patience = Patience(lambda line: print(line, flush=True))

    def run(self) -> None:
        """Until every run is over, no more are to start, or another job does this.

        Raises:
            MhmoeError: the text of some runs could not be prepared; all others had their turn.
        """
        while self._before and self._lives(self._before[-1]):  # it may be starting a run
            time.sleep(POLL_SECONDS)
        self._runs = dict(self._place.runs())
        if not self._retry:
            self._over |= {name for name, run in self._runs.items() if _is_recorded(run)}
        why_not: dict[Path, MhmoeError | None] = {}
        while self._is_its_turn and any(entry.name not in self._over for entry in self._entries):
            alive = [entry.name for entry in self._entries if self._is_alive(entry.name)]
            for entry in self._entries:
                if len(alive) >= self._concurrent or not self._is_its_turn:
                    break
                if entry.name in self._over or entry.name in alive:
                    continue
                folder = entry.spec.data.prepared
                if folder not in why_not:
                    why_not[folder] = _prepare(entry)
                if why_not[folder]:
                    self._over.add(entry.name)
                elif self._start(entry):
                    alive.append(entry.name)
            time.sleep(POLL_SECONDS)
        for error in filter(None, why_not.values()):
            raise error

    @property
    def _is_its_turn(self) -> bool:
        return not self._place.stop_file.exists() and self._place.definition().jobs[-1].job == self._job

    def _lives(self, job: str) -> bool:
        return self._patience.ask(lambda: jobs.is_alive(self._connection, job), True)

    def _is_alive(self, name: str) -> bool:
        """Whether a job of it goes on; what is over for good is remembered."""
        run = self._runs.get(name)
        if run is None or name in self._over or not read_attempts(run):
            return False
        try:
            over = self._outcome(run)
        except ClusterError as e:
            print(f"{name}: {e}", flush=True)
            return True
        if over is None:
            self._starts.setdefault(name, 0)  # by another job, but its end is for this one to see
            return True
        if over.state == "finished" or (name in self._starts and not self._was_killed(run, name, over)):
            self._over.add(name)
            print(f"{name}: {over.state} {over.reason}".rstrip(), flush=True)
        return False

    def _outcome(self, run: RunDir) -> Outcome | None:
        """As its own cluster says, which need not be this one, nor be there any more."""
        return outcome_or_gone(run, lambda address: self._connection if address == self._address else connect(address))

    def _was_killed(self, run: RunDir, name: str, over: Outcome) -> bool:
        """Its job ended without a word, and is to be started again."""
        return (
            over.state == "failed" and recorded_outcome(events.events(run)) is None and self._starts[name] < MOST_STARTS
        )

    def _start(self, entry: SweepRun) -> bool:
        run = self._runs.get(entry.name)
        if run is None:
            run = self._runs[entry.name] = create_run(entry.spec)
            self._place.write_runs(self._runs)
        else:
            run.write_spec(entry.spec)  # where it computes may have changed
        self._starts[entry.name] = self._starts.get(entry.name, 0) + 1
        run.stop_file.unlink(missing_ok=True)
        try:
            job = start_attempt(run, entry.spec, self._connection, known_as=self._address)
        except MhmoeError as e:
            print(f"{entry.name}: {e}", flush=True)
            self._over.add(entry.name)
            return False
        print(f"{entry.name}: run {run.id}, job {job}", flush=True)
        return True


def _is_recorded(run: RunDir) -> bool:
    """Whether it failed or was stopped, by its own account."""
    return events.state(events.events(run)) in ("failed", "stopped")


def _prepare(entry: SweepRun) -> MhmoeError | None:
    """Make the text of a run ready before any run with that text starts: two would do it at the same time. Why that
    cannot be is said at once, but not as what ended this job, which goes on with other text."""
    try:
        prepare(entry.spec)
    except MhmoeError as e:
        print(f"{entry.name}: {e}", flush=True)
        return e
    return None
