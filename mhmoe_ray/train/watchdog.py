"""Watchdog: an actor beside the workers that gets each rank's heartbeat once a second, finds the rank that hangs, and
kills its process, so that Ray Train restarts the workers from the newest checkpoint.

It runs outside all ranks: a rank that was stopped, or whose node swaps, cannot detect this itself, and the others wait
for it in a collective operation without an error. Ray's own health check sees a process that is dead, not one that
hangs.
"""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from threading import Event, Lock, Thread
from typing import Any, Literal

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mhmoe_ray.errors import StorageError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import location

BEAT_SECONDS = 1.0
Doing = Literal["restoring", "training", "validating", "saving"]


@dataclass(frozen=True)
class Place:
    """Process of a rank, for the record and for a person who must find it."""

    rank: int
    pid: int
    began: float
    """Start time of the process in seconds since the epoch, since the pid may be reused later."""
    host: str
    node: str

    @classmethod
    def here(cls, rank: int) -> "Place":
        began = psutil.Process().create_time()
        return cls(rank, os.getpid(), began, socket.gethostname(), ray.get_runtime_context().get_node_id())


@dataclass(frozen=True)
class Progress:
    """Progress of a rank, as its heartbeats report it."""

    place: Place
    life: int = 0
    """Counter that grows with everything that the rank gets done, in any thread."""
    done: int = 0
    """Counter that grows with the progress of training itself, equally on all ranks; writing does not count."""
    step: int = 0
    doing: Doing = "restoring"


class Heartbeat(AbstractContextManager["Heartbeat"]):
    """Heartbeat of a rank: sends its progress to the watchdog every `BEAT_SECONDS`, from its own thread, until the
    context ends."""

    def __init__(self, watchdog: Any, place: Place) -> None:
        """Prepare the heartbeat, which starts when the context is entered.

        Args:
            watchdog: the watchdog actor.
            place: process of this rank.
        """
        self.place = place
        self._watchdog, self._progress, self._over = watchdog, Progress(place), Event()
        self._lock = Lock()
        self._thread = Thread(target=self._tell, name="pulse", daemon=True)

    def at(self, step: int, doing: Doing) -> None:
        """Report the step and the phase that this rank has reached; this counts as progress of training.

        Args:
            step: number of the last step that is done.
            doing: phase that begins now.
        """
        self._move(step=step, doing=doing)

    def beat(self) -> None:
        """Report progress of training itself."""
        self._move()

    def stir(self) -> None:
        """Report progress beside training, for example of writing a checkpoint."""
        self._move(done=0)

    def _move(self, done: int = 1, **news: Any) -> None:
        with self._lock:
            now = self._progress
            self._progress = replace(now, life=now.life + 1, done=now.done + done, **news)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _tell(self) -> None:
        while True:
            self._watchdog.hear.remote(self._progress)
            if self._over.wait(BEAT_SECONDS):
                self._watchdog.forget.remote(self.place)
                return


@dataclass
class _Heard:
    progress: Progress
    heard: float
    moved: float


class Watchdog:
    """Class of the watchdog actor, which `start` creates."""

    def __init__(self, run: str, patience: float) -> None:
        """Prepare a watchdog that knows no rank yet.

        Args:
            run: path of the run directory, for events.
            patience: seconds without progress, or without a heartbeat, after which a rank counts as hung.
        """
        self._run, self._patience = RunDir(location(run)), patience
        self._ranks: dict[Place, _Heard] = {}

    @classmethod
    def start(cls, run: RunDir, patience: float) -> Any:
        """Start an actor on the node of this process, which watches until the job ends, and return its handle."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0)(cls).options(scheduling_strategy=here).remote(str(run.path), patience)
        actor.watch.remote()
        return actor

    async def hear(self, progress: Progress) -> None:
        now = time.monotonic()
        before = self._ranks.get(progress.place)
        moved = now if before is None or progress.life > before.progress.life else before.moved
        self._ranks[progress.place] = _Heard(progress, now, moved)

    async def stir(self) -> None:
        """Count progress for all ranks: something that all of them wait for advances."""
        now = time.monotonic()
        for heard in self._ranks.values():
            heard.moved = now

    async def forget(self, place: Place) -> None:
        self._ranks.pop(place, None)

    async def watch(self) -> None:
        """Look every `BEAT_SECONDS` for ranks that hang and end them, for ever."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            now = time.monotonic()
            if now - looked > BEAT_SECONDS + self._patience / 2:
                # This process itself stood still, or its whole machine did: nobody could be heard.
                for heard in self._ranks.values():
                    heard.heard = heard.moved = now
            looked = now
            for culprit in self._culprits(now):
                await self._end(culprit, now)

    def _culprits(self, now: float) -> list[_Heard]:
        """Return the ranks that hang.

        These are the ranks without a heartbeat for `patience` seconds. If there are none, and no rank has made progress
        for so long, they are the ranks that are behind the others; in a collective operation that no rank leaves, these
        are all ranks.
        """
        ranks = list(self._ranks.values())
        silent = [r for r in ranks if now - r.heard > self._patience]
        if silent or not ranks or any(now - r.moved <= self._patience for r in ranks):
            return silent
        behind = min((r.progress.step, r.progress.done) for r in ranks)
        return [r for r in ranks if (r.progress.step, r.progress.done) == behind]

    async def _end(self, hung: _Heard, now: float) -> None:
        """Kill the process of a rank that hangs and record it, if the process still exists.

        It may not exist: ranks of a worker group that Ray ended are silent too.
        """
        progress, place = hung.progress, hung.progress.place
        self._ranks.pop(place, None)
        there = NodeAffinitySchedulingStrategy(place.node, soft=False)
        try:
            killing: Awaitable[bool] = _kill.options(scheduling_strategy=there).remote(place.pid, place.began)
            was_there = await killing
        except ray.exceptions.RayError as e:  # its node is gone, which Ray sees by itself
            print(f"watchdog: rank {place.rank} on {place.host} cannot be ended: {e}")
            return
        if was_there:
            silent = now - hung.heard > self._patience
            seconds = round(now - (hung.heard if silent else hung.moved), 1)
            told = {"rank": place.rank, "host": place.host, "pid": place.pid, "step": progress.step}
            try:
                events.record(self._run, "hung", **told, doing=progress.doing, seconds=seconds, silent=silent)
            except StorageError as e:  # which is no reason to stop watching
                print(f"watchdog: rank {place.rank} hung and was ended, but {e}")


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]  # Ray's have no types for us
def _kill(pid: int, began: float) -> bool:
    """Kill a process of this node, and return whether it was there to be killed.

    Args:
        pid: id of the process.
        began: start time of the process; a process with the same id and another start time is left alone.
    """
    try:
        process = psutil.Process(pid)
        if process.create_time() != began or process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True
