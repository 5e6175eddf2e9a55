"""Placement of workers on several nodes: it is recorded, shown and refused where the spec says so, and changes no
result."""

import pytest
import torch

from mhmoe_ray.checkpoint.load import load_tensors
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import history, metrics
from tests.cli.audit import assert_read_as_ordered
from tests.several_nodes.alone import trained_alone
from tests.several_nodes.runs import assert_as_planned, command, layout, submit, write
from tests.watch import newest, started, wait_for_the_end

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHORT = {"steps": 20, "validate_every": 10, "checkpoint_every": 20}


def assert_as_alone(run):
    """Assert that a run has the samples, the losses and the last weights of one process."""
    assert_read_as_ordered(run)
    expected = trained_alone(run.spec(), SHORT["steps"])
    assert [line[metrics.LOSS] for line in history.read(run)] == pytest.approx(expected.losses, rel=1e-4)
    checkpoint, _, _ = newest_checkpoint(run)
    found = {name: torch.empty_like(tensor) for name, tensor in expected.weights.items()}
    load_tensors(checkpoint / "weights", found)
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-3, rtol=1e-2, msg=name)


def test_groups_lie_within_nodes_where_they_fit(nodes, project):
    with nodes.only([2, 0, 2, 0]):
        run = submit(nodes, project, train=SHORT)
        wait_for_the_end(run)
    [event] = started(run)
    places, groups = layout(nodes, event)
    assert places == ["0", "0", "2", "2"]
    assert_as_planned(event, groups)
    assert event["straddling_groups"] == 0
    assert_as_alone(run)


def test_groups_that_must_lie_on_several_nodes_are_named_and_stay_within_racks(nodes, project):
    with nodes.only([1, 1, 1, 1]):
        write(project, train=SHORT, cluster={"domain_label": "rack"})
        followed = command(nodes, project, "submit", "spec.yaml", "--address", nodes.address)
        assert followed.code == 0, followed.err
    run = newest(project)
    [event] = started(run)
    places, groups = layout(nodes, event, "rack")
    assert places == ["0", "1", "2", "3"]
    assert_as_planned(event, groups)
    assert (event["straddling_groups"], event["groups_apart"]) == (2, 0)
    warning = "2 expert-parallel groups lie on more than one node"
    assert f"warning: {warning}\n" in followed.err
    assert warning in command(nodes, project, "status", run.id).out.replace("\n", " ")
    assert_as_alone(run)


def test_rows_go_by_node_in_a_group_on_two_nodes(nodes, project):
    """Fewer rows leave a node in hierarchical dispatch than in flat dispatch, and training gives the same results."""
    with nodes.only([2, 0, 2, 0]):
        run = submit(nodes, project, train=SHORT, cluster={"ep": 4, "dispatch": "hierarchical"})
        wait_for_the_end(run)
    [event] = started(run)
    assert (event["dispatch"], event["flat_groups"], event["groups"]) == ("hierarchical", 0, [[0, 1, 2, 3]])
    line = history.last(run)
    # Flat, two of the three other ranks are on the other node, and rows with two experts there go twice.
    assert 0 < line[metrics.ROWS_BETWEEN_NODES] < 0.9 * line[metrics.ROWS_LEAST] * 2 / 3
    assert_as_alone(run)


def test_such_groups_are_refused_in_one_line(nodes, project):
    with nodes.only([1, 1, 0, 0]):
        write(project, train=SHORT, cluster={"workers": 2, "straddling": "refuse", "max_failures": 0})
        refused = command(nodes, project, "submit", "spec.yaml", "--address", nodes.address)
    assert refused.code == JobError.exit_code, refused
    last = refused.err.splitlines()[-1]
    assert last.startswith("error: run tiny-")
    assert "1 of 1 expert-parallel groups would lie on more than one node" in last
    assert "Traceback" not in refused.out + refused.err
    assert not started(newest(project))
