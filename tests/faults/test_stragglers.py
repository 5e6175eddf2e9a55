"""Tests of stragglers in runs: a rank of half speed is named, and healthy runs name nobody."""

import pytest

from mhmoe_ray.runs import history, metrics
from tests.cli.run import mhmoe
from tests.faults import harness
from tests.support.watch import events_of_kind, step_of, wait_for_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # quick tests are in tests/train/test_stragglers.py
HALF_SPEED = """
import sys, time
def halve_speed(class_object, name):
    function = getattr(class_object, name)
    def slow_function(*args, **keywords):
        start_time = time.perf_counter()
        result = function(*args, **keywords)
        time.sleep(time.perf_counter() - start_time)
        return result
    setattr(class_object, name, slow_function)
halve_speed(sys.modules["mhmoe_ray.train.step"].Trainer, "forward")
halve_speed(sys.modules["mhmoe_ray.distributed.strategies.ddp"].Strategy, "backward")
"""


@pytest.mark.parametrize("cluster", [{"workers": 2, "ep": 2}, {"workers": 4, "ep": 2}])
def test_a_rank_of_half_speed_is_named_within_50_steps(project, tmp_path, cluster):
    cluster |= harness.disturbing_environment(CODE=str(tmp_path))
    harness.write_random_spec(project, train={"steps": 10_000, "checkpoint_every": 1000}, cluster=cluster)
    run = harness.submit(project)
    worker = harness.workers_of_start(run, 1)[1]
    wait_until(lambda: step_of(run) >= 50, "steps of a healthy run")
    assert events_of_kind(run, "straggler") == []
    harness.run_code(tmp_path, worker["pid"], HALF_SPEED)
    step = step_of(run)
    [event, *_] = wait_until(lambda: events_of_kind(run, "straggler"), "the event")
    [straggler] = event["ranks"]
    print(f"after {event['step'] - step} steps: {straggler}")
    assert (straggler["rank"], straggler["node"], straggler["part"]) == (1, worker["node"], "compute")
    assert event["step"] <= step + 50
    assert "slow rank 1 on" in " ".join(mhmoe(project, "status", run.id).out.split())
    assert mhmoe(project, "stop", run.id).code == 0
    wait_for_end(run, state="stopped")


@pytest.mark.parametrize("cluster", [{"workers": 2, "ep": 2}, {"workers": 4, "ep": 4}, {"workers": 4, "ep": 1}])
def test_healthy_runs_name_nobody(project, cluster):
    harness.write_random_spec(project, train={"steps": 400, "checkpoint_every": 100}, cluster=cluster)
    run = harness.submit(project)
    wait_for_end(run)
    assert events_of_kind(run, "straggler") == []
    assert all(line[metrics.SLOWDOWN] >= 1 for line in history.read(run))
