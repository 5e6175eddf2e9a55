"""Tests of the diagnosis of a hang: who waits for whom, and the stacks of a process."""

import os
import signal
import subprocess
import sys

import pytest

from mhmoe_ray.train import hangs
from mhmoe_ray.train.hangs import GroupState, Wait
from tests.support.ranks import run_ranks
from tests.support.watch import wait_until


def groups(number, *, pending=True, ranks=(0, 1, 2), name="world"):
    """Return the state of a rank that waits in its newest collective of a group, or has completed it."""
    return {name: GroupState(ranks, number, (number, "all_reduce") if pending else None)}


@pytest.mark.parametrize(
    ("states", "silent_ranks", "waits", "awaited_ranks"),
    [
        ({0: groups(5), 1: groups(5), 2: groups(4, pending=False)}, [], {0: {2}, 1: {2}}, {2}),
        ({0: groups(5), 1: groups(5)}, [2], {0: {2}, 1: {2}}, {2}),
        ({0: groups(5), 1: groups(5), 2: groups(5)}, [], {}, set()),  # all wait in the same collective
        ({0: groups(5), 1: groups(5)}, [], {}, set()),  # rank 2 makes progress, so nothing is known of its collectives
        ({0: groups(5), 1: groups(5), 2: {}}, [], {0: {2}, 1: {2}}, {2}),
        # Rank 0 waits for rank 1 only, because that itself waits for rank 2.
        (
            {0: groups(5, ranks=(0, 1), name="a"), 1: groups(9, ranks=(1, 2), name="b"), 2: {}},
            [],
            {0: {1}, 1: {2}},
            {2},
        ),
    ],
)
def test_ranks_wait_for_those_that_have_not_issued_their_collective(states, silent_ranks, waits, awaited_ranks):
    actual_waits = hangs.find_waits(states, silent_ranks)
    assert {rank: set(wait.missing_ranks) for rank, wait in actual_waits.items()} == waits
    assert hangs.awaited_ranks(actual_waits) == awaited_ranks


def states_while_rank_0_waits():
    """Return the collectives of this rank while rank 0 waits for rank 1 in the second of two groups."""
    import torch
    import torch.distributed as dist

    group, values, store = dist.new_group([0, 1]), torch.ones(2), dist.distributed_c10d._get_default_store()
    dist.all_reduce(values)
    dist.all_reduce(values, group=group)
    if dist.get_rank():
        states = hangs.collectives()
        store.wait(["rank 0 has read its states"])
        dist.all_to_all_single(torch.empty(2), values, group=group)
    else:
        work = dist.all_to_all_single(torch.empty(2), values, group=group, async_op=True)
        # A thread of gloo records that the collective before is complete, which may be after it has returned here.
        wait_until(
            lambda: (2, "all_to_all") in {state.pending for state in hangs.collectives().values()}, "the all_to_all"
        )
        states = hangs.collectives()
        store.set("rank 0 has read its states", "")
        work.wait()
    return states


def test_the_flight_recorder_shows_the_collective_that_a_rank_waits_in():
    states = dict(enumerate(run_ranks(2, states_while_rank_0_waits)))
    waits = hangs.find_waits(states, [])
    assert waits == {0: Wait("all_to_all 2", frozenset([1]))}


PROCESS = """
import ctypes
from mhmoe_ray.train import hangs
def train_worker():
    hangs.write_stacks_on_signal()
    print("ready", flush=True)
    library = ctypes.PyDLL(None)
    while True:
        library.sleep(60)  # holds the lock that all threads of Python need, and ends at a signal
train_worker()
"""


def test_a_process_writes_its_stacks_although_no_thread_of_python_runs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESS)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            wait_until(lambda: hangs.read_process(process.pid).activity == "in train_worker (script.py:9)", "the sleep")
            # Each reading has the stacks of its own signal alone.
            assert hangs.read_process(process.pid).stacks.count(" in train_worker\n") == 1
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            assert hangs.read_process(process.pid) == hangs.ProcessState("stopped")
        finally:
            process.kill()
