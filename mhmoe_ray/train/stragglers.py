"""Detection of stragglers: ranks whose own time in a step is longer than that of the others, in most of the last steps.

The own time of a rank is the time from the start of a step to the end of its last backward, without its waits for
other ranks. It consists of the wait for data and the computation. With the strategies `fsdp` and `zero3` it also has
the waits for weights of other ranks, which hide a straggler.
"""

import logging
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.errors import StorageError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train.watchdog import WorkerInfo

LOGGER = logging.getLogger("mhmoe")

STEPS = 30
"""Number of last steps that are compared."""
SLOWDOWN = 1.4
"""Own time over the median of the other ranks, from which on a rank counts as slow in a step."""
SLOW_STEPS, RECOVERED_STEPS = 18, 9
"""Numbers of slow steps of the last `STEPS`: from the first on, a rank is a straggler, and down to the second, it is
none any more. In tests/train/healthy_times.json, with up to four ranks on two cores beside other work, a healthy rank
is slow in at most 14 steps, and one of half speed in at least 18."""


class Straggler(NamedTuple):
    """Rank that was slow."""

    rank: int
    slow_steps: int  # of the last `STEPS`
    slowdown: float  # median over these steps of its own time over the median of the others
    part: str  # part of its own time that is longer than that of the others: "data" or "compute"


def slowdowns(time_R: np.ndarray) -> np.ndarray:
    """Return each rank's own time over the median of the other ranks'; 1 for a single rank."""
    if len(time_R) == 1:
        return np.ones(1)
    return np.array([time / max(np.median(np.delete(time_R, rank)), 1e-9) for rank, time in enumerate(time_R)])


def find_stragglers(times: Sequence[np.ndarray], known_ranks: Collection[int] = ()) -> list[Straggler]:
    """Return the stragglers of the last `STEPS` steps. `times` has the computation and the wait for data of each rank
    in each step, (R, 2) in seconds; `known_ranks` are the stragglers found before. With fewer steps, there are none."""
    if len(times) < STEPS:
        return []
    time_SR2 = np.stack(list(times)[-STEPS:])
    slowdown_SR = np.stack([slowdowns(time_R) for time_R in time_SR2.sum(2)])
    slow_steps_R = (slowdown_SR > SLOWDOWN).sum(0)
    mean_R2 = time_SR2.mean(0)
    stragglers = []
    for rank, slow_steps in enumerate(slow_steps_R.tolist()):
        if slow_steps >= SLOW_STEPS or (rank in known_ranks and slow_steps > RECOVERED_STEPS):
            excess_2 = mean_R2[rank] - np.median(np.delete(mean_R2, rank, axis=0), axis=0)
            part = ("compute", "data")[int(excess_2.argmax())]
            slowdown = round(float(np.median(slowdown_SR[:, rank])), 2)
            stragglers.append(Straggler(rank, slow_steps, slowdown, part))
    return stragglers


class StragglerRecorder:
    """Recorder of an event whenever other ranks are stragglers than in the step before."""

    def __init__(self, run: RunDir, worker_infos: Sequence[WorkerInfo]) -> None:
        self._run, self._worker_infos = run, worker_infos
        self._times: deque[np.ndarray] = deque(maxlen=STEPS)
        self._known_ranks: set[int] = set()

    def record(self, step: int, time_R2: np.ndarray) -> None:
        """Take the times of a step, as in `find_stragglers`."""
        self._times.append(time_R2)
        stragglers = find_stragglers(self._times, self._known_ranks)
        ranks = {straggler.rank for straggler in stragglers}
        if ranks == self._known_ranks:
            return
        self._known_ranks = ranks
        entries = []
        for straggler in stragglers:
            info = self._worker_infos[straggler.rank]
            entries.append({**straggler._asdict(), "steps": STEPS, "host": info.host, "node": info.node})
        try:
            events.record(self._run, "straggler", step=step, ranks=entries)
        except StorageError as e:
            # The run trains on; a missing event must not restart all ranks.
            LOGGER.warning("the stragglers %s cannot be recorded: %s", sorted(ranks), e)
