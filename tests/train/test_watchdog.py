"""The ranks that the watchdog takes for hung; tests/faults runs it on real clusters."""

import asyncio
import sys
from threading import Thread

import pytest

from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train import watchdog
from mhmoe_ray.train.watchdog import Place, Progress, Heartbeat, Watchdog

PATIENCE = 10.0
PLACES = [Place(rank, 100 + rank, 0.0, "host", "node") for rank in range(3)]


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(watchdog.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def dog(tmp_path, clock):
    return Watchdog(str(tmp_path), PATIENCE)


def hear(dog, *beats, step=7):
    """Let each rank report its own count to the watchdog; a rank whose count is None reports nothing."""
    for place, count in zip(PLACES, beats, strict=True):
        if count is not None:
            asyncio.run(dog.hear(Progress(place, life=count, done=count, step=step, doing="training")))


def culprits(dog, clock):
    return [found.progress.place.rank for found in dog._culprits(clock.now)]


def test_nobody_while_anyone_gets_on(dog, clock):
    hear(dog, 1, 1, 1)
    for i in range(5):
        clock.now += 8
        hear(dog, 1, 2 + i, 1)  # two wait for a long time, for one that works
        assert culprits(dog, clock) == []


def test_those_that_say_nothing(dog, clock):
    hear(dog, 5, 5, 5)
    for i in range(11):
        assert culprits(dog, clock) == []
        clock.now += 1
        hear(dog, 6 + i, None, 5)
    assert culprits(dog, clock) == [1]


def test_else_those_that_are_behind(dog, clock):
    """All ranks answer and none makes progress: the last one has not come to where the others wait."""
    hear(dog, 9, 9, 8)
    for _ in range(11):
        assert culprits(dog, clock) == []
        clock.now += 1
        hear(dog, 9, 9, 8)
    assert culprits(dog, clock) == [2]


def test_or_all_where_none_is(dog, clock):
    hear(dog, 9, 9, 9)
    clock.now += 11
    hear(dog, 9, 9, 9)
    assert culprits(dog, clock) == [0, 1, 2]


def test_nobody_while_what_all_wait_for_gets_on(dog, clock):
    """The files of a checkpoint are read in this way, before any rank is told where to begin."""
    for _ in range(5):
        hear(dog, 3, 3, 3)
        clock.now += 8
        asyncio.run(dog.stir())
        assert culprits(dog, clock) == []
    clock.now += 11
    hear(dog, 3, 3, 3)
    assert culprits(dog, clock) == [0, 1, 2]


def test_not_those_that_had_less_to_write_beside_it(dog, clock):
    for place, pieces, done in zip(PLACES, (40, 3, 11), (9, 9, 8), strict=True):
        asyncio.run(dog.hear(Progress(place, life=done + pieces, done=done, step=7, doing="training")))
    clock.now += 11
    for place in PLACES:
        asyncio.run(dog.hear(dog._ranks[place].progress))
    assert culprits(dog, clock) == [2]


def test_threads_of_a_rank_lose_nothing_of_what_each_other_did():
    pulse, times = Heartbeat(None, PLACES[0]), 50_000
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        saver = Thread(target=lambda: [pulse.stir() for _ in range(times)])
        saver.start()
        for _ in range(times):
            pulse.beat()
        saver.join()
    finally:
        sys.setswitchinterval(switch)
    assert pulse._progress == Progress(PLACES[0], life=2 * times, done=times)


def test_one_that_ended_is_not_missed(dog, clock):
    hear(dog, 1, 1, 1)
    for place in PLACES:
        asyncio.run(dog.forget(place))
    clock.now += 100
    assert culprits(dog, clock) == []


def test_a_sentence_says_who_and_where(tmp_path):
    told = {"rank": 3, "host": "n1", "pid": 4711, "step": 41, "doing": "training", "seconds": 600.2}
    events.record(RunDir(tmp_path), "hung", **told, silent=True)
    [event] = events.events(RunDir(tmp_path))
    assert events.hung(event) == (
        "rank 3 (process 4711 on n1) gave no sign of life for 600 s, training after step 41; it was ended"
    )
