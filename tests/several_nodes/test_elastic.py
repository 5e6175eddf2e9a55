"""Runs that lose nodes and get them back, on a real cluster of several nodes."""

import pytest

from mhmoe_ray.planner.placement import expert_groups
from mhmoe_ray.runs import history, jsonl, metrics
from mhmoe_ray.runs.directory import RunDir
from tests.cli.audit import expected_streams
from tests.several_nodes.alone import trained_alone
from tests.several_nodes.runs import assert_as_planned, command, submit
from tests.watch import of_kind, started, step_of, wait_for_the_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def assert_nothing_lost_or_repeated(run: RunDir) -> None:
    """Assert that a run has each step once, with the samples and the loss that one process has."""
    lines = history.read(run)
    steps = len(lines)
    assert [line[metrics.STEP] for line in lines] == list(range(1, steps + 1))
    assert [line[metrics.STREAM] for line in lines] == expected_streams(run)[:steps]
    expected = trained_alone(run.spec(), steps).losses
    found = [line[metrics.LOSS] for line in lines]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_run_shrinks_when_it_loses_a_node_and_grows_when_it_is_back(nodes, project):
    with nodes.only([2, 2, 0, 0]):
        run = submit(nodes, project, cluster={"workers": {"min": 2, "max": 4}, "max_failures": 1})
        wait_until(lambda: step_of(run) >= 12, "step 12")
        nodes.kill(1)
        wait_until(lambda: len(started(run)) == 2, "start 2 of the workers")
        nodes.bring_back()
        wait_until(lambda: len(started(run)) == 3, "start 3 of the workers")
        wait_until(lambda: step_of(run) >= started(run)[2]["step"] + 3, "three steps more")
        with nodes.replaced(0):
            wait_until(lambda: len(started(run)) == 4, "start 4 of the workers")
            wait_until(lambda: step_of(run) >= started(run)[3]["step"] + 3, "three steps more")
            run.stop_file.touch()
            wait_for_the_end(run, state="stopped")
    first, second, third, fourth = started(run)
    assert [len(e["workers"]) for e in (first, second, third, fourth)] == [4, 2, 4, 2]
    assert [e["groups"] for e in (first, second)] == [[[0, 1], [2, 3]], [[0, 1]]]
    assert second["step"] % 10 == third["step"] % 10 == 0
    assert 10 <= second["step"] < third["step"]
    [preempted] = of_kind(run, "preempted")
    assert fourth["step"] == preempted["step"]
    assert_nothing_lost_or_repeated(run)


def test_a_run_saves_and_leaves_a_node_that_is_taken_away(nodes, project):
    """The run goes on without a failure to spare, on a node that was free, at the very step of that checkpoint.

    Its one group lies on two nodes, which is recorded and shown.
    """
    with nodes.only([1, 1, 1, 0]):
        run = submit(nodes, project, cluster={"workers": 2, "max_failures": 0}, train={"checkpoint_every": 1000})
        wait_until(lambda: step_of(run) >= 3, "step 3")
        taken = started(run)[0]["workers"][1]["node"]
        with nodes.replaced(int(nodes.labels("place")[taken])):
            wait_until(lambda: len(started(run)) == 2, "start 2 of the workers")
            wait_until(lambda: step_of(run) >= started(run)[1]["step"] + 3, "three steps more")
            run.stop_file.touch()
            wait_for_the_end(run, state="stopped")
    [preempted] = of_kind(run, "preempted")
    assert preempted["nodes"] == [taken]
    assert preempted["time"] < preempted["deadline"]
    for event in started(run):
        assert_as_planned(event, expert_groups([worker["node"] for worker in event["workers"]], 2))
        assert event["straddling_groups"] == 1
    second = started(run)[1]
    assert second["step"] == preempted["step"]
    assert len(second["workers"]) == 2
    assert taken not in {worker["node"] for worker in second["workers"]}
    lines = [line[metrics.STEP] for line in jsonl.read(run.metrics_file)]
    assert lines == list(range(1, len(lines) + 1)), "a step was trained twice"
    assert_nothing_lost_or_repeated(run)
    status = " ".join(command(nodes, project, "status", run.id).out.split())
    assert "is taken away within" in status
    assert "1 expert-parallel groups lie on more than one node" in status


def test_a_run_is_resumed_with_a_range_of_workers(nodes, project):
    with nodes.only([2, 1, 0, 0]):
        run = submit(nodes, project, cluster={"workers": 2}, train={"checkpoint_every": 5, "steps": 30})
        wait_until(lambda: step_of(run) >= 3, "step 3")
        run.stop_file.touch()
        wait_for_the_end(run, state="stopped")
        resumed = command(nodes, project, "resume", run.id, "--set", "cluster.workers={min: 2, max: 4}")
    assert resumed.code == 0, resumed.err
    at = started(run)[1]["step"]
    assert f"training from step {at} on 2 (of 2 to 4) workers, dp 1 x ep 2, start 2 of the workers" in resumed.err
    assert_nothing_lost_or_repeated(run)
