"""Tests of the ranks that the watchdog counts as hung; tests/faults runs it on real clusters."""

import asyncio
import os
import signal
import subprocess
import sys
from threading import Thread

import psutil
import pytest

from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train import watchdog
from mhmoe_ray.train.watchdog import Heartbeat, Progress, Watchdog, WorkerInfo

TIMEOUT = 10.0
WORKERS = [WorkerInfo(rank, 100 + rank, 0.0, "host", "node") for rank in range(3)]


@pytest.fixture
def clock(monkeypatch):
    """Replace the watchdog's clock by one that a test sets in `seconds`."""

    class Clock:
        seconds = 1000.0

    monkeypatch.setattr(watchdog.time, "monotonic", lambda: Clock.seconds)
    return Clock


@pytest.fixture
def actor(tmp_path, clock):
    return Watchdog(str(tmp_path), TIMEOUT)


def send_heartbeats(actor, *counts, step=7):
    """Let each rank send a heartbeat with its count of progress reports; a rank whose count is None sends none."""
    for worker_info, count in zip(WORKERS, counts, strict=True):
        if count is not None:
            asyncio.run(
                actor.receive(
                    Progress(worker_info, activity=count, training_progress=count, step=step, phase="training")
                )
            )


def hung_ranks(actor, clock):
    """Return the ranks that the watchdog counts as hung at this time."""
    return [record.progress.worker_info.rank for record in actor._hung_ranks(clock.seconds)]


def test_no_rank_hangs_while_one_makes_progress(actor, clock):
    send_heartbeats(actor, 1, 1, 1)
    for i in range(5):
        clock.seconds += 8
        send_heartbeats(actor, 1, 2 + i, 1)  # ranks 0 and 2 make no progress, because they wait for rank 1
        assert hung_ranks(actor, clock) == []


def test_ranks_without_heartbeat_hang(actor, clock):
    send_heartbeats(actor, 5, 5, 5)
    for i in range(11):
        assert hung_ranks(actor, clock) == []
        clock.seconds += 1
        send_heartbeats(actor, 6 + i, None, 5)
    assert hung_ranks(actor, clock) == [1]


def test_ranks_that_are_behind_hang(actor, clock):
    """All ranks send heartbeats and none makes progress: rank 2 has not reached the operation where the others wait."""
    send_heartbeats(actor, 9, 9, 8)
    for _ in range(11):
        assert hung_ranks(actor, clock) == []
        clock.seconds += 1
        send_heartbeats(actor, 9, 9, 8)
    assert hung_ranks(actor, clock) == [2]


def test_all_ranks_hang_if_none_is_behind(actor, clock):
    send_heartbeats(actor, 9, 9, 9)
    clock.seconds += 11
    send_heartbeats(actor, 9, 9, 9)
    assert hung_ranks(actor, clock) == [0, 1, 2]


def test_no_rank_hangs_while_shared_work_makes_progress(actor, clock):
    """Shared work is done once for all ranks, which wait for it, such as hashing a checkpoint's files at the start."""
    for _ in range(5):
        send_heartbeats(actor, 3, 3, 3)
        clock.seconds += 8
        asyncio.run(actor.report_shared_progress())
        assert hung_ranks(actor, clock) == []
    clock.seconds += 11
    send_heartbeats(actor, 3, 3, 3)
    assert hung_ranks(actor, clock) == [0, 1, 2]


def test_side_progress_does_not_make_a_rank_behind(actor, clock):
    """A rank is behind by its training progress; work beside training, such as saving, does not count."""
    for worker_info, pieces, training_progress in zip(WORKERS, (40, 3, 11), (9, 9, 8), strict=True):
        asyncio.run(
            actor.receive(
                Progress(
                    worker_info,
                    activity=training_progress + pieces,
                    training_progress=training_progress,
                    step=7,
                    phase="training",
                )
            )
        )
    clock.seconds += 11
    for worker_info in WORKERS:
        asyncio.run(actor.receive(actor._records[worker_info].progress))
    assert hung_ranks(actor, clock) == [2]


def test_progress_reports_of_all_threads_are_counted():
    """Two threads report at the same time, and both reports count."""
    heartbeat, count = Heartbeat(None, WORKERS[0], TIMEOUT), 50_000
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        saver = Thread(target=lambda: [heartbeat.report_side_progress() for _ in range(count)])
        saver.start()
        for _ in range(count):
            heartbeat.report_progress()
        saver.join()
    finally:
        sys.setswitchinterval(switch_interval)
    assert heartbeat._progress == Progress(WORKERS[0], activity=2 * count, training_progress=count)


def test_forgotten_ranks_do_not_hang(actor, clock):
    send_heartbeats(actor, 1, 1, 1)
    for worker_info in WORKERS:
        asyncio.run(actor.forget(worker_info))
    clock.seconds += 100
    assert hung_ranks(actor, clock) == []


def test_hang_description_names_rank_and_process(tmp_path):
    fields = {"rank": 3, "host": "n1", "pid": 4711, "step": 41, "doing": "training", "seconds": 600.2}
    events.record(RunDir(tmp_path), "hung", **fields, silent=True)
    waiting = {"all_to_all 1,204": [0, 1], "all_reduce 7": [2]}
    events.record(RunDir(tmp_path), "hung", **fields, silent=True, state="stopped", waiting=waiting, stacks="stacks/1")
    old_event, event = events.read(RunDir(tmp_path))
    assert events.describe_hang(old_event) == (
        "rank 3 (process 4711 on n1): it sent no heartbeat for 600 s, training after step 41, and was killed"
    )
    assert events.describe_hang(event) == (
        "ranks 0, 1 wait in all_to_all 1,204 and rank 2 waits in all_reduce 7 for rank 3 (process 4711 on n1), "
        "which is stopped: it sent no heartbeat for 600 s, training after step 41, and was killed "
        "(stacks of all ranks: stacks/1)"
    )


def test_a_process_is_known_by_its_ticks_whatever_the_clock_says():
    kill_process = watchdog._kill_process._function
    process = subprocess.Popen(["sleep", "60"])
    try:
        ticks = watchdog._start_ticks(process.pid)
        assert ticks > watchdog._start_ticks(os.getpid())
        assert not kill_process(process.pid, psutil.Process(process.pid).create_time(), ticks - 1)
        # The clock was set after the process had started.
        assert kill_process(process.pid, psutil.Process(process.pid).create_time() - 3600, ticks)
        assert process.wait(10) == -signal.SIGKILL
        assert not kill_process(process.pid, 0.0, ticks)
    finally:
        process.kill()
