"""Watchdog: an actor that receives a heartbeat from each rank once a second and kills the process of a rank that hangs.

Ray Train then restarts the workers from the newest checkpoint. The watchdog runs outside all ranks: a rank that was
stopped, or whose node swaps, cannot detect this itself, and the other ranks wait for it in a collective operation
without an error. Ray's own health check finds a dead process, not a hanging one.

A rank hangs if it sends no heartbeat for the timeout (`cluster.hang_seconds`). If no rank makes progress for that long,
those hang for which the others wait in a collective (hangs.py) or, if nobody waits, those that are behind. Before a
rank is killed, the stacks of all ranks are written into the run directory. A straggler (stragglers.py) still makes
progress and is left alone.
"""

import asyncio
import os
import socket
import time
from collections import defaultdict
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Literal

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mhmoe_ray.errors import StorageError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import location, replace_file, report_write_errors
from mhmoe_ray.train import hangs
from mhmoe_ray.train.hangs import GroupState, ProcessState, Wait

# Time between two heartbeats of a rank, and between two checks for ranks that hang. It is short compared with the
# timeout, which is 600 s by default (`cluster.hang_seconds`).
HEARTBEAT_SECONDS = 1.0
# The stacks of all ranks are requested this long before the timeout of a rank, and waited for as long after it. Ray
# starts a process on each node to read them, which takes seconds on a busy machine.
STACKS_SECONDS = 3.0
Phase = Literal["restoring", "training", "validating", "saving"]


@dataclass(frozen=True)
class WorkerInfo:
    """Process of a rank, as the event "started" records it and as the watchdog identifies it."""

    rank: int
    pid: int
    # When the process has ended, the operating system may give its pid to another process. The start time tells these
    # two processes apart.
    began: float  # start time in seconds since the epoch
    host: str
    node: str
    # If the system's clock is set, Linux gives another start time since the epoch for the same process, but never other
    # ticks since the boot.
    start_ticks: int | None = None  # start time in clock ticks since the boot; None on systems other than Linux

    @classmethod
    def current(cls, rank: int) -> "WorkerInfo":
        """Return the `WorkerInfo` of the current process, which runs as `rank`."""
        began, pid, node = psutil.Process().create_time(), os.getpid(), ray.get_runtime_context().get_node_id()
        return cls(rank, pid, began, socket.gethostname(), node, _start_ticks(pid))


@dataclass(frozen=True)
class Progress:
    """Progress of a rank in training, which each of its heartbeats carries to the watchdog."""

    worker_info: WorkerInfo
    activity: int = 0  # finished pieces of work in all threads, of training and of checkpoints
    training_progress: int = 0  # finished pieces of training work, such as micro-batches; equal growth on all ranks
    step: int = 0
    phase: Phase = "restoring"
    collectives: Mapping[str, GroupState] | None = None  # only while the rank makes no progress


class Heartbeat(AbstractContextManager["Heartbeat"]):
    """Heartbeat of a rank: a thread that sends its progress every `HEARTBEAT_SECONDS` while the context is open."""

    def __init__(self, watchdog: Any, worker_info: WorkerInfo, stall_seconds: float) -> None:
        """Prepare a heartbeat that tells the rank's collectives after `stall_seconds` without progress."""
        self.worker_info, self._stall_seconds = worker_info, stall_seconds
        self._watchdog, self._progress, self._stop_event = watchdog, Progress(worker_info), Event()
        # The lock is needed because two threads count progress: the one that trains, and the one that writes a
        # checkpoint.
        self._lock = Lock()
        self._thread = Thread(target=self._send_heartbeats, name="heartbeat", daemon=True)

    def report_phase(self, step: int, phase: Phase) -> None:
        """Report the last finished step and the phase that begins now; this counts as progress in training."""
        self._update(step=step, phase=phase)

    def report_progress(self) -> None:
        """Report a finished piece of training work, such as a micro-batch, within a phase."""
        self._update()

    def report_side_progress(self) -> None:
        """Report a finished piece of work beside training, such as a part of a checkpoint."""
        self._update(training_progress=0)

    def _update(self, training_progress: int = 1, **changes: Any) -> None:
        with self._lock:
            progress = self._progress
            self._progress = replace(
                progress,
                activity=progress.activity + 1,
                training_progress=progress.training_progress + training_progress,
                **changes,
            )

    def __enter__(self) -> "Heartbeat":
        hangs.write_stacks_on_signal()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_event.set()
        self._thread.join()

    def _send_heartbeats(self) -> None:
        activity, progress_time = -1, 0.0
        while True:
            progress, current_time = self._progress, time.monotonic()
            if progress.activity != activity:
                activity, progress_time = progress.activity, current_time
            elif current_time - progress_time > self._stall_seconds:
                progress = replace(progress, collectives=hangs.collectives())
            self._watchdog.receive.remote(progress)
            if self._stop_event.wait(HEARTBEAT_SECONDS):
                # Without this call the watchdog would take the rank for hung, because a rank that has ended sends no
                # more heartbeats.
                self._watchdog.forget.remote(self.worker_info)
                return


@dataclass
class _RankRecord:
    progress: Progress
    # Both times are read from the watchdog's own monotonic clock, because the clocks of nodes differ.
    heartbeat_time: float
    progress_time: float


class Watchdog:
    """Ray actor that watches the heartbeats of all ranks and kills the process of a hung one; `start` creates it."""

    def __init__(self, run: str, timeout: float) -> None:
        self._run, self._timeout = RunDir(location(run)), timeout
        self._records: dict[WorkerInfo, _RankRecord] = {}

    @classmethod
    def start(cls, run: RunDir, timeout: float) -> Any:
        """Start the watchdog actor, which watches all ranks until the job ends, and return its handle."""
        # The watchdog runs on the job's own node, so that it survives the loss of any other node.
        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0)(cls).options(scheduling_strategy=strategy).remote(str(run.path), timeout)
        actor.watch.remote()
        return actor

    async def receive(self, progress: Progress) -> None:
        """Receive a heartbeat of a rank; the watchdog watches a rank from its first heartbeat on."""
        current_time = time.monotonic()
        previous_record = self._records.get(progress.worker_info)
        progress_time = (
            current_time
            if previous_record is None or progress.activity > previous_record.progress.activity
            else previous_record.progress_time
        )
        self._records[progress.worker_info] = _RankRecord(progress, current_time, progress_time)

    async def report_shared_progress(self) -> None:
        """Count progress for all ranks, during work of the job that all ranks wait for, such as hashing files."""
        current_time = time.monotonic()
        for record in self._records.values():
            record.progress_time = current_time

    async def forget(self, worker_info: WorkerInfo) -> None:
        """Stop watching a rank; a rank calls this when it ends, because it will send no more heartbeats."""
        self._records.pop(worker_info, None)

    async def watch(self) -> None:
        """Check every `HEARTBEAT_SECONDS` for ranks that hang, and kill their processes. This never returns."""
        last_check_time = time.monotonic()
        stacks: dict[Any, list[WorkerInfo]] = {}
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            current_time = time.monotonic()
            if current_time - last_check_time > HEARTBEAT_SECONDS + self._timeout / 2:
                # This process, or its whole machine, stood still and could not receive heartbeats. All ranks get the
                # current time, because otherwise healthy ranks would seem to hang.
                for record in self._records.values():
                    record.heartbeat_time = record.progress_time = current_time
            last_check_time = current_time
            is_suspicious = bool(self._hung_ranks(current_time + STACKS_SECONDS))
            stacks = (stacks or self._request_stacks()) if is_suspicious else {}
            if hung_ranks := self._hung_ranks(current_time):
                waits = self._waits(current_time)
                process_states, stacks_file = await self._record_stacks(stacks)
                stacks = {}
                for hung_rank in hung_ranks:
                    state = process_states.get(hung_rank.progress.worker_info)
                    await self._kill_rank(hung_rank, current_time, waits, state, stacks_file)
                # The other ranks still wait for the killed ones, until they notice that these are gone.
                for record in self._records.values():
                    record.heartbeat_time = record.progress_time = time.monotonic()

    def _hung_ranks(self, current_time: float) -> list[_RankRecord]:
        """Return the ranks that hang; if all are stuck in the same collective operation, all of them do."""
        records = list(self._records.values())
        silent_ranks = [r for r in records if self._is_silent(r, current_time)]
        if silent_ranks or not records or any(current_time - r.progress_time <= self._timeout for r in records):
            return silent_ranks
        awaited_ranks = hangs.awaited_ranks(self._waits(current_time))
        if awaited_records := [r for r in records if r.progress.worker_info.rank in awaited_ranks]:
            return awaited_records
        # The counter `activity` of a rank does not show which ranks are behind: it also counts pieces of a checkpoint,
        # and ranks write different numbers of pieces.
        least_progress = min((r.progress.step, r.progress.training_progress) for r in records)
        return [r for r in records if (r.progress.step, r.progress.training_progress) == least_progress]

    def _is_silent(self, record: _RankRecord, current_time: float) -> bool:
        return current_time - record.heartbeat_time > self._timeout

    def _waits(self, current_time: float) -> dict[int, Wait]:
        records = {record.progress.worker_info.rank: record for record in self._records.values()}
        silent_ranks = [rank for rank, record in records.items() if self._is_silent(record, current_time)]
        states = {rank: r.progress.collectives for rank, r in records.items() if r.progress.collectives is not None}
        return hangs.find_waits(states, silent_ranks)

    def _request_stacks(self) -> dict[Any, list[WorkerInfo]]:
        """Return a task for each node that reads the states of the processes of its ranks, with these ranks."""
        nodes = defaultdict[str, list[WorkerInfo]](list)
        for worker_info in self._records:
            nodes[worker_info.node].append(worker_info)
        tasks: dict[Any, list[WorkerInfo]] = {}
        for node, worker_infos in nodes.items():
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            processes = [(info.pid, info.began, info.start_ticks) for info in worker_infos]
            task = asyncio.wrap_future(_read_processes.options(scheduling_strategy=strategy).remote(processes).future())
            tasks[task] = worker_infos
        return tasks

    async def _record_stacks(
        self, tasks: Mapping[Any, list[WorkerInfo]]
    ) -> tuple[dict[WorkerInfo, ProcessState], str | None]:
        """Write the stacks that `_request_stacks` asked for into one file of the run directory. Return the state of
        each rank's process, and the path of the file in the run directory; None without any stacks."""
        finished_tasks, _ = await asyncio.wait(tasks, timeout=STACKS_SECONDS)
        states: dict[WorkerInfo, ProcessState] = {}
        for task in finished_tasks:
            if error := task.exception():
                # The node is gone. Ray detects this itself and ends the worker group.
                print(f"watchdog: the stacks of a node cannot be read: {error}")
                continue
            states |= {info: state for info, state in zip(tasks[task], task.result(), strict=True) if state}
        texts = [
            f"rank {info.rank} (process {info.pid} on {info.host}), {state.activity}\n\n{state.stacks}\n"
            for info, state in sorted(states.items(), key=lambda item: item[0].rank)
        ]
        file = self._run.stacks / f"{time.time():.0f}.txt"
        try:
            with report_write_errors(file):
                replace_file(file, "\n".join(texts).encode())
        except StorageError as e:
            # The ranks must be killed even if their stacks cannot be written.
            print(f"watchdog: the stacks of the ranks cannot be written: {e}")
            return states, None
        return states, f"{file.parent.name}/{file.name}"

    async def _kill_rank(
        self,
        record: _RankRecord,
        current_time: float,
        waits: Mapping[int, Wait],
        state: ProcessState | None,
        stacks_file: str | None,
    ) -> None:
        """Kill a rank that hangs. Record an event, unless Ray has ended the worker group and the process is gone."""
        progress, worker_info = record.progress, record.progress.worker_info
        self._records.pop(worker_info, None)
        strategy = NodeAffinitySchedulingStrategy(worker_info.node, soft=False)
        try:
            kill_task: Awaitable[bool] = _kill_process.options(scheduling_strategy=strategy).remote(
                worker_info.pid, worker_info.began, worker_info.start_ticks
            )
            was_alive = await kill_task
        except ray.exceptions.RayError as e:
            # The node is gone, and the process with it. Ray detects this itself and ends the worker group.
            print(f"watchdog: rank {worker_info.rank} on {worker_info.host} cannot be killed: {e}")
            return
        if was_alive:
            is_silent = self._is_silent(record, current_time)
            seconds = round(current_time - (record.heartbeat_time if is_silent else record.progress_time), 1)
            fields = {"rank": worker_info.rank, "host": worker_info.host, "pid": worker_info.pid, "step": progress.step}
            waiting_ranks = defaultdict[str, list[int]](list)
            for rank, wait in sorted(waits.items()):
                if worker_info.rank in wait.missing_ranks:
                    waiting_ranks[wait.collective].append(rank)
            fields |= {"state": state and state.activity, "waiting": waiting_ranks, "stacks": stacks_file}
            try:
                events.record(self._run, "hung", **fields, doing=progress.phase, seconds=seconds, silent=is_silent)
            except StorageError as e:
                # This error must not end the watchdog, because other ranks may hang later.
                print(f"watchdog: rank {worker_info.rank} hung and was killed, but the event is missing: {e}")


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]  # Ray's decorator is untyped
def _read_processes(processes: list[tuple[int, float, int | None]]) -> list[ProcessState | None]:
    """Return the states of processes of this node, each given by its id and start time; None for one that is gone."""

    def read_process(process: tuple[int, float, int | None]) -> ProcessState | None:
        try:
            return hangs.read_process(process[0]) if _is_alive(*process) else None
        except (psutil.NoSuchProcess, OSError):
            return None

    with ThreadPoolExecutor(len(processes)) as executor:
        return list(executor.map(read_process, processes))


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _kill_process(pid: int, began: float, start_ticks: int | None) -> bool:
    """Kill a process of this node if it started at the given time, and return whether it was alive."""
    try:
        if not _is_alive(pid, began, start_ticks):
            return False
        psutil.Process(pid).kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _is_alive(pid: int, began: float, start_ticks: int | None) -> bool:
    process = psutil.Process(pid)
    is_same = process.create_time() == began if start_ticks is None else _start_ticks(pid) == start_ticks
    return is_same and process.status() != psutil.STATUS_ZOMBIE


def _start_ticks(pid: int) -> int | None:
    """Return when a process of this machine started, in clock ticks since the boot; None if /proc does not tell it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the name of the program, in parentheses, which may have spaces. Field 22 is the start time.
    return int(text.rpartition(")")[2].split()[19])
