"""Tests of ranks that hang: stopped processes, and functions that never return. The right rank must be named."""

import os
import random
import signal
import time

import pytest

from mhmoe_ray.runs import events
from tests.cli.run import mhmoe
from tests.faults import harness
from tests.support.watch import events_of_kind, wait_for_end, wait_until

pytestmark = pytest.mark.ray
KINDS = ("sleep", "loop", "locked")
FUNCTIONS = (
    "mhmoe_ray.train.step Trainer forward",
    "mhmoe_ray.train.step Trainer update",
    "mhmoe_ray.train.worker _TimedBatches __iter__",
    "mhmoe_ray.train.telemetry.sinks Telemetry report",
    "mhmoe_ray.distributed.dispatch.exchange RowExchange start_rows",
    "mhmoe_ray.distributed.strategies.gradients ExpertReduction finish",
    "mhmoe_ray.checkpoint.save Saver save",
)


CODE = """
import ctypes, sys
def hang(*_, **__):
    library = (ctypes.PyDLL if "{kind}" == "locked" else ctypes.CDLL)(None)
    while True:
        if "{kind}" != "loop":
            library.sleep(3600)  # a signal ends it
setattr(sys.modules["{module}"].{class_name}, "{name}", hang)
"""


def submit(project, folder, steps, hang_seconds, **cluster):
    """Submit a run whose ranks hang when `hang_rank` asks them to."""
    cluster |= {"hang_seconds": hang_seconds, **harness.disturbing_environment(CODE=str(folder))}
    harness.write_random_spec(project, train={"steps": steps}, cluster=cluster)
    return harness.submit(project)


def hang_rank(run, folder, start, rank, request):
    """Let a rank hang after the workers' `start`-th start, stopped if `request` is "stop"; check the watchdog's event.

    Return the seconds from the request to the event.
    """
    worker = harness.workers_of_start(run, start)[rank]
    request_time = time.time()
    if request == "stop":
        assert harness.kill(worker["pid"], signal.SIGSTOP)
    else:
        kind, module, class_name, name = request.split()
        harness.run_code(folder, worker["pid"], CODE.format(kind=kind, module=module, class_name=class_name, name=name))
    wait_until(lambda: len(events_of_kind(run, "hung")) >= start, f"event of the watchdog ({rank}, {request})")
    hung_events = events_of_kind(run, "hung")
    event = hung_events[start - 1]
    print(f"{event['time'] - request_time:.1f} s: {events.describe_hang(event)}", flush=True)
    assert len(hung_events) == start
    assert (event["rank"], event["pid"]) == (rank, worker["pid"])
    assert event["silent"] == request.startswith(("stop", "locked"))
    assert any(event["waiting"].values())
    parts = (run.path / event["stacks"]).read_text().split("\nrank ")
    for part in parts:
        is_stopped = request == "stop" and part is parts[rank]
        assert ("in train_worker" in part) == (not is_stopped), part
    assert event["state"] == "stopped" if request == "stop" else "in hang (" in event["state"]
    return event["time"] - request_time


def test_a_hanging_rank_is_named_and_ended_and_changes_nothing(project, tmp_path, reference):
    """First a process is stopped, then a function never returns; the other rank waits in a collective each time."""
    run = submit(project, tmp_path, 120, 20)
    hang_rank(run, tmp_path, 1, 1, "stop")
    hang_rank(run, tmp_path, 2, 0, f"loop {FUNCTIONS[0]}")
    output = " ".join(mhmoe(project, "status", run.id).out.split())
    assert "rank 1 waits in all_to_all" in output
    assert "which is in hang (" in output
    wait_for_end(run)
    harness.assert_equals_undisturbed_run(run, reference)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [2, 4])
def test_random_hangs_are_named(project, tmp_path, workers):
    """Twenty hangs at random moments, or SOAK_HANGS, of which half are stopped processes."""
    rng = random.Random(int(os.environ.get("SOAK_SEED", "1")))
    run = submit(project, tmp_path, 100_000, 30, workers=workers)
    seconds = []
    for start in range(1, int(os.environ.get("SOAK_HANGS", "20")) + 1):
        harness.workers_of_start(run, start)
        time.sleep(rng.uniform(0, 3))
        request = "stop" if start % 2 else f"{rng.choice(KINDS)} {rng.choice(FUNCTIONS)}"
        seconds.append(hang_rank(run, tmp_path, start, rng.randrange(workers), request))
    print(f"{workers} ranks: named after {min(seconds):.1f} to {max(seconds):.1f} s")
    assert mhmoe(project, "stop", run.id).code == 0
