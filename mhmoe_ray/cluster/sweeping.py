"""The job of a sweep: start its runs, so many at a time, each as a job of its own.

Run by Ray Jobs as `python -m mhmoe_ray.cluster.sweeping SWEEP_DIR`. A run is an ordinary one: `mhmoe status`, `logs`,
`stop` and `resume` know it, and what happens to it leaves the others alone. This job may be killed and started again at
any time: what runs goes on by itself, and what is finished stays so.
"""

import sys
import time
from pathlib import Path

import ray

from mhmoe_ray.cluster import tokens
from mhmoe_ray.cluster.attempts import start_attempt
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.watch import outcome, recorded_outcome
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.errors import ClusterError, MhmoeError
from mhmoe_ray.location import location
from mhmoe_ray.runs.layout import RunDir, create_run
from mhmoe_ray.runs.state import read_attempts
from mhmoe_ray.runs.sweeps import SweepDir
from mhmoe_ray.spec import SweepRun

POLL_SECONDS = 2.0
MOST_STARTS = 3
"""Of one run by one job, where the run's job was killed before it could say how the run ended."""


class Sweep:
    def __init__(self, place: SweepDir, connection: Connection) -> None:
        """Args:
        place: its directory.
        connection: to the cluster, from within it.
        """
        self._place, self._connection = place, connection
        self._definition = place.definition()
        self._runs: dict[str, RunDir] = dict(place.runs())
        self._starts: dict[str, int] = {}
        self._over: set[str] = set()
        self._prepared: set[Path] = set()

    def run(self) -> None:
        """Until every run is over, or no more are to start. Commands may add some meanwhile."""
        while not self._place.stop_file.exists() and any(
            entry.name not in self._over for entry in self._definition.entries
        ):
            self._definition = self._place.definition()
            entries = self._definition.entries
            self._prepare(entries)
            alive = [entry.name for entry in entries if self._is_alive(entry.name)]
            for entry in entries:
                if len(alive) >= self._definition.concurrent:
                    break
                if entry.name not in self._over and entry.name not in alive and self._start(entry):
                    alive.append(entry.name)
            time.sleep(POLL_SECONDS)

    def _prepare(self, entries: list[SweepRun]) -> None:
        """The text of all runs, before any of them starts: two would do it at the same time."""
        for entry in entries:
            if (folder := entry.spec.data.prepared) not in self._prepared:
                prepare(entry.spec)
                self._prepared.add(folder)

    def _is_alive(self, name: str) -> bool:
        """Whether a job of it goes on; what is over for good is remembered."""
        run = self._runs.get(name)
        if run is None or name in self._over or not read_attempts(run):
            return False
        try:
            over = outcome(run, self._connection)
        except ClusterError as e:
            print(f"{name}: {e}", flush=True)
            return True
        if over is None:
            return True
        if over.state == "finished" or (name in self._starts and not self._was_killed(run, name)):
            self._over.add(name)
            print(f"{name}: {over.state} {over.reason}".rstrip(), flush=True)
        return False

    def _was_killed(self, run: RunDir, name: str) -> bool:
        """Its job ended without a word, and is to be started again."""
        return recorded_outcome(run) is None and self._starts[name] < MOST_STARTS

    def _start(self, entry: SweepRun) -> bool:
        run = self._runs.get(entry.name)
        if run is None:
            run = self._runs[entry.name] = create_run(entry.spec)
            self._place.write_runs(self._runs)
        else:
            run.write_spec(entry.spec)  # where it computes may have changed
        self._starts[entry.name] = self._starts.get(entry.name, 0) + 1
        run.stop_file.unlink(missing_ok=True)
        address = self._definition.jobs[-1].address
        try:
            job = start_attempt(run, entry.spec, self._connection, known_as=address)
        except MhmoeError as e:
            print(f"{entry.name}: {e}", flush=True)
            self._over.add(entry.name)
            return False
        print(f"{entry.name}: run {run.id}, job {job}", flush=True)
        return True


def main() -> None:
    place = SweepDir(location(sys.argv[1]))
    try:
        context = ray.init()
        local = place.definition().jobs[-1].local
        connection = Connection(f"http://{context.dashboard_url}", local, local, tokens.user_token())
        Sweep(place, connection).run()
    except MhmoeError as e:
        print(f"error: {e}")
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
