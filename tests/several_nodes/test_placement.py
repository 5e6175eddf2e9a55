"""Tests of the placement of workers on several nodes: it is recorded, shown, or refused, and changes no result."""

from collections import Counter

import pytest
import torch

from mhmoe_ray.checkpoint.load import load_tensors
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import history, metrics
from tests.cli.audit import assert_samples_in_order
from tests.cli.run import assert_one_line
from tests.several_nodes.alone import train_on_one_process
from tests.several_nodes.runs import assert_as_planned, layout, run_command, submit, write_spec
from tests.support.watch import newest_run, start_events, step_of, wait_for_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHORT = {"steps": 20, "validate_every": 10, "checkpoint_every": 20}


def assert_equals_single_process(run):
    """Assert that a run of `SHORT` has the samples, losses and last weights of a training on one process."""
    assert_samples_in_order(run)
    expected = train_on_one_process(run.spec(), SHORT["steps"])
    assert [line[metrics.LOSS] for line in history.read(run)] == pytest.approx(expected.losses, rel=1e-4)
    checkpoint, _, _ = newest_checkpoint(run)
    actual = {name: torch.empty_like(tensor) for name, tensor in expected.weights.items()}
    load_tensors(checkpoint / "weights", actual)
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-3, rtol=1e-2, msg=name)


def test_groups_that_fit_on_a_node_lie_within_it(nodes, project):
    with nodes.leave_slots([2, 0, 2]):
        run = submit(nodes, project, train=SHORT)
        wait_for_end(run)
    [event] = start_events(run)
    node_indices, groups = layout(nodes, event)
    assert node_indices == ["0", "0", "2", "2"]
    assert_as_planned(event, groups)
    assert event["straddling_groups"] == 0
    assert_equals_single_process(run)


def test_workers_are_placed_so_that_groups_lie_within_nodes_where_ray_would_split_one(nodes, project):
    """Ray would fill the node with room for three first. The workers of a node that dies are placed on another."""
    with nodes.leave_slots([3, 2, 0, 2, 1, 2]):
        run = submit(
            nodes, project, cluster={"workers": 6, "max_failures": 1}, train={"micro_batches": 6, "checkpoint_every": 5}
        )
        wait_until(lambda: step_of(run) >= 6, "step 6")
        [first_start] = start_events(run)
        indices = nodes.labels("node_index")
        lost_node = next(i for i in (1, 3, 5) if nodes.node_id(i) in {w["node"] for w in first_start["workers"]})
        nodes.kill(lost_node)
        wait_until(lambda: len(start_events(run)) == 2, "start 2 of the workers")
        wait_until(lambda: step_of(run) >= start_events(run)[1]["step"] + 3, "three steps more")
        run.stop_file.touch()
        wait_for_end(run, state="stopped")
        nodes.bring_back()
    for event in start_events(run):
        ranks_by_node = Counter(indices[worker["node"]] for worker in event["workers"])
        assert (event["straddling_groups"], sorted(ranks_by_node.values())) == (0, [2, 2, 2])
    assert str(lost_node) not in {indices[worker["node"]] for worker in start_events(run)[1]["workers"]}


def test_straddling_groups_are_reported_and_stay_within_racks(nodes, project):
    with nodes.leave_slots([1, 1, 1, 1]):
        write_spec(project, train=SHORT, cluster={"domain_label": "rack"})
        followed = run_command(nodes, project, "submit", "spec.yaml", "--address", nodes.address)
        assert followed.code == 0, followed.err
    run = newest_run(project)
    [event] = start_events(run)
    node_indices, groups = layout(nodes, event, "rack")
    assert node_indices == ["0", "1", "2", "3"]
    assert_as_planned(event, groups)
    assert (event["straddling_groups"], event["groups_apart"]) == (2, 0)
    warning = "2 expert-parallel groups lie on more than one node"
    assert f"warning: {warning}\n" in followed.err
    assert warning in run_command(nodes, project, "status", run.id).out.replace("\n", " ")
    assert_equals_single_process(run)


def test_hierarchical_dispatch_sends_fewer_rows_between_nodes(nodes, project):
    """Flat dispatch would send more rows between nodes; the result of the training is the same as on one process."""
    with nodes.leave_slots([2, 0, 2]):
        run = submit(nodes, project, train=SHORT, cluster={"ep": 4, "dispatch": "hierarchical"})
        wait_for_end(run)
    [event] = start_events(run)
    assert (event["dispatch"], event["flat_groups"], event["groups"]) == ("hierarchical", 0, [[0, 1, 2, 3]])
    line = history.last_line(run)
    # With flat dispatch about 2 / 3 of the rows would leave a node, because two of the three other ranks are on the
    # other node. A row with two experts there would go twice.
    assert 0 < line[metrics.ROWS_BETWEEN_NODES] < 0.9 * line[metrics.ROWS_LEAST] * 2 / 3
    assert_equals_single_process(run)


def test_groups_that_no_node_holds_are_refused_before_the_job(nodes, project):
    write_spec(project, train=SHORT, cluster={"ep": 4, "straddling": "refuse"})
    result = run_command(nodes, project, "submit", "spec.yaml", "--address", nodes.address)
    assert_one_line(result, 5, "whichever nodes are chosen, 1 of 1 expert-parallel groups would lie on more than one")


def test_straddling_groups_are_refused_in_one_line(nodes, project):
    with nodes.leave_slots([1, 1]):
        write_spec(project, train=SHORT, cluster={"workers": 2, "straddling": "refuse", "max_failures": 0})
        result = run_command(nodes, project, "submit", "spec.yaml", "--address", nodes.address)
    assert result.code == JobError.exit_code, result
    last_line = result.err.splitlines()[-1]
    assert last_line.startswith("error: run tiny-")
    assert "1 of 1 expert-parallel groups would lie on more than one node" in last_line
    assert "Traceback" not in result.out + result.err
    assert not start_events(newest_run(project))
