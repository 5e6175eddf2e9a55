"""Tests of stragglers in runs: a rank of half speed is named, and healthy runs name nobody."""

import signal
import time
from threading import Event, Thread

import pytest

from mhmoe_ray.runs import history, metrics
from tests.cli.run import mhmoe
from tests.faults import harness
from tests.support.watch import events_of_kind, step_of, wait_for_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # quick tests are in tests/train/test_stragglers.py


def halve_speed(pid, stop_event):
    """Stop and continue a process in turns, so that it computes for half of the time."""
    while not stop_event.wait(0.01) and harness.kill(pid, signal.SIGSTOP):
        time.sleep(0.01)
        harness.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("cluster", [{"workers": 2, "ep": 2}, {"workers": 4, "ep": 2}, {"workers": 4, "ep": 1}])
def test_a_rank_of_half_speed_is_named_within_50_steps(project, cluster):
    harness.write_random_spec(project, train={"steps": 10_000, "checkpoint_every": 1000}, cluster=cluster)
    run = harness.submit(project)
    worker = harness.workers_of_start(run, 1)[1]
    wait_until(lambda: step_of(run) >= 30, "steps of a healthy run")
    stop_event, step = Event(), step_of(run)
    thread = Thread(target=halve_speed, args=(worker["pid"], stop_event))
    thread.start()
    try:
        [event] = wait_until(lambda: events_of_kind(run, "straggler"), "the straggler")
        output = " ".join(mhmoe(project, "status", run.id).out.split())
    finally:
        stop_event.set()
        thread.join()
    [straggler] = event["ranks"]
    print(cluster, f"after {event['step'] - step} steps:", straggler)
    assert (straggler["rank"], straggler["node"]) == (1, worker["node"])
    assert event["step"] <= step + 50
    assert "slow rank 1 on" in output
    wait_until(lambda: len(events_of_kind(run, "straggler")) > 1, "the rank's recovery")
    assert events_of_kind(run, "straggler")[1]["ranks"] == []
    assert mhmoe(project, "stop", run.id).code == 0
    wait_for_end(run, state="stopped")


@pytest.mark.parametrize("cluster", [{"workers": 2, "ep": 2}, {"workers": 4, "ep": 4}, {"workers": 4, "ep": 1}])
def test_healthy_runs_name_nobody(project, cluster):
    harness.write_random_spec(project, train={"steps": 400, "checkpoint_every": 100}, cluster=cluster)
    run = harness.submit(project)
    wait_for_end(run)
    assert events_of_kind(run, "straggler") == []
    assert all(line[metrics.SLOWDOWN] >= 1 for line in history.read(run))
