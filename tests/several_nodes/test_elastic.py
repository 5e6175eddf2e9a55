"""Tests of runs that lose nodes and get them back, on a real cluster of several nodes."""

import pytest

from mhmoe_ray.planner.placement import expert_groups
from mhmoe_ray.runs import history, jsonl, metrics
from mhmoe_ray.runs.directory import RunDir
from tests.cli.audit import expected_streams
from tests.several_nodes.alone import train_on_one_process
from tests.several_nodes.runs import assert_as_planned, run_command, submit
from tests.support.watch import events_of_kind, start_events, step_of, wait_for_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def assert_nothing_lost_or_repeated(run: RunDir) -> None:
    """Assert that a run has each step once, with the samples and nearly the losses of a training on one process."""
    lines = history.read(run)
    steps = len(lines)
    assert [line[metrics.STEP] for line in lines] == list(range(1, steps + 1))
    assert [line[metrics.STREAM] for line in lines] == expected_streams(run)[:steps]
    expected = train_on_one_process(run.spec(), steps).losses
    losses = [line[metrics.LOSS] for line in lines]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_run_shrinks_when_it_loses_a_node_and_grows_when_it_is_back(nodes, project):
    with nodes.leave_slots([2, 2]):
        run = submit(nodes, project, cluster={"workers": {"min": 2, "max": 4}, "max_failures": 1})
        wait_until(lambda: step_of(run) >= 12, "step 12")
        nodes.kill(1)
        wait_until(lambda: len(start_events(run)) == 2, "start 2 of the workers")
        nodes.bring_back()
        wait_until(lambda: len(start_events(run)) == 3, "start 3 of the workers")
        wait_until(lambda: step_of(run) >= start_events(run)[2]["step"] + 3, "three steps more")
        with nodes.drained_and_replaced(0):
            wait_until(lambda: len(start_events(run)) == 4, "start 4 of the workers")
            wait_until(lambda: step_of(run) >= start_events(run)[3]["step"] + 3, "three steps more")
            run.stop_file.touch()
            wait_for_end(run, state="stopped")
    first_start, second_start, third_start, fourth_start = start_events(run)
    assert [len(e["workers"]) for e in (first_start, second_start, third_start, fourth_start)] == [4, 2, 4, 2]
    assert [e["groups"] for e in (first_start, second_start)] == [[[0, 1], [2, 3]], [[0, 1]]]
    assert second_start["step"] % 10 == third_start["step"] % 10 == 0
    assert 10 <= second_start["step"] < third_start["step"]
    [preempted] = events_of_kind(run, "preempted")
    assert fourth_start["step"] == preempted["step"]
    assert_nothing_lost_or_repeated(run)


def test_a_run_saves_and_leaves_a_preempted_node(nodes, project):
    """The run saves a checkpoint and continues from it on a node that was free, which does not count as a failure.

    The run's only expert-parallel group lies on two nodes, which the run records and `mhmoe status` shows.
    """
    with nodes.leave_slots([1, 1, 1]):
        run = submit(nodes, project, cluster={"workers": 2, "max_failures": 0}, train={"checkpoint_every": 1000})
        wait_until(lambda: step_of(run) >= 3, "step 3")
        node_to_drain = start_events(run)[0]["workers"][1]["node"]
        with nodes.drained_and_replaced(int(nodes.labels("node_index")[node_to_drain])):
            wait_until(lambda: len(start_events(run)) == 2, "start 2 of the workers")
            wait_until(lambda: step_of(run) >= start_events(run)[1]["step"] + 3, "three steps more")
            run.stop_file.touch()
            wait_for_end(run, state="stopped")
    [preempted] = events_of_kind(run, "preempted")
    assert preempted["nodes"] == [node_to_drain]
    assert preempted["time"] < preempted["deadline"]
    for event in start_events(run):
        assert_as_planned(event, expert_groups([worker["node"] for worker in event["workers"]], 2))
        assert event["straddling_groups"] == 1
    second_start = start_events(run)[1]
    assert second_start["step"] == preempted["step"]
    assert len(second_start["workers"]) == 2
    assert node_to_drain not in {worker["node"] for worker in second_start["workers"]}
    lines = [line[metrics.STEP] for line in jsonl.read(run.metrics_file)]
    assert lines == list(range(1, len(lines) + 1)), "a step was trained twice"
    assert_nothing_lost_or_repeated(run)
    status = " ".join(run_command(nodes, project, "status", run.id).out.split())
    assert "is preempted within" in status
    assert "1 expert-parallel groups lie on more than one node" in status


def test_a_run_is_resumed_with_a_range_of_workers(nodes, project):
    with nodes.leave_slots([2, 1]):
        run = submit(nodes, project, cluster={"workers": 2}, train={"checkpoint_every": 5, "steps": 30})
        wait_until(lambda: step_of(run) >= 3, "step 3")
        run.stop_file.touch()
        wait_for_end(run, state="stopped")
        resumed = run_command(nodes, project, "resume", run.id, "--set", "cluster.workers={min: 2, max: 4}")
    assert resumed.code == 0, resumed.err
    restart_step = start_events(run)[1]["step"]
    assert (
        f"training from step {restart_step} on 2 (of 2 to 4) workers, dp 1 x ep 2, start 2 of the workers"
        in " ".join(resumed.err.split())  # undoes the wrapping of long lines
    )
    assert_nothing_lost_or_repeated(run)
