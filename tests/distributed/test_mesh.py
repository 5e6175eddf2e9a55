"""The nodes on which the ranks of a group may be."""

import pytest

from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.runs.events import straddling
from mhmoe_ray.spec import ClusterSpec
from tests.specs import tiny_spec


def test_a_group_on_two_nodes_is_refused_where_the_spec_says_so():
    strict = tiny_spec(cluster={"workers": 2, "ep": 2, "straddling": "refuse"}).cluster
    with pytest.raises(ClusterError, match="1 of 1 expert-parallel groups would lie on more than one node"):
        build_mesh(strict, ["a", "b"], "cpu")
    assert build_mesh(strict, ["a", "a"], "cpu").straddling == 0
    assert build_mesh(tiny_spec(cluster={"workers": 2, "ep": 2}).cluster, ["a", "b"], "cpu").groups == [[0, 1]]


def test_what_is_said_of_groups_on_several_nodes():
    assert straddling({"straddling_groups": 0, "groups_apart": 0}) is None
    said = "2 expert-parallel groups lie on more than one node"
    assert straddling({"straddling_groups": 2}) == said
    assert straddling({"straddling_groups": 2, "groups_apart": 1}) == f"{said}, 1 of them in more than one domain"
    assert straddling({"straddling_groups": 2, "flat_groups": 1}) == (
        f"{said}; 1 with unequally many ranks on their nodes, so that dispatch stays flat there"
    )


def test_groups_that_are_no_grid_of_nodes_are_counted():
    spec = ClusterSpec(workers=8, ep=4)
    assert build_mesh(spec, [*"aaaabbbc"], "cpu").uneven == 1
    assert build_mesh(spec, [*"aaaabbcc"], "cpu").uneven == 0
