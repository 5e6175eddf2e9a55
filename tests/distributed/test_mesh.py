"""Tests of expert-parallel groups that lie on several nodes: they are refused, described and counted."""

import pytest

from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.runs.events import describe_straddling_groups
from mhmoe_ray.spec import ClusterSpec
from tests.support.specs import tiny_spec


def test_a_group_on_two_nodes_is_refused_if_the_spec_refuses_it():
    strict = tiny_spec(cluster={"workers": 2, "ep": 2, "straddling": "refuse"}).cluster
    with pytest.raises(ClusterError, match="1 of 1 expert-parallel groups would lie on more than one node"):
        build_mesh(strict, ["a", "b"], "cpu")
    assert build_mesh(strict, ["a", "a"], "cpu").straddling_count == 0
    assert build_mesh(tiny_spec(cluster={"workers": 2, "ep": 2}).cluster, ["a", "b"], "cpu").groups == [[0, 1]]


def test_groups_on_several_nodes_are_described():
    assert describe_straddling_groups({"straddling_groups": 0, "groups_apart": 0}) is None
    text = "2 expert-parallel groups lie on more than one node"
    assert describe_straddling_groups({"straddling_groups": 2}) == text
    assert (
        describe_straddling_groups({"straddling_groups": 2, "groups_apart": 1})
        == f"{text}, 1 of them in more than one domain"
    )
    assert describe_straddling_groups({"straddling_groups": 2, "flat_groups": 1}) == (
        f"{text}; 1 with unequal numbers of ranks per node, where dispatch stays flat"
    )


def test_groups_that_are_no_grid_of_nodes_are_counted():
    spec = ClusterSpec(workers=8, ep=4)
    assert build_mesh(spec, [*"aaaabbbc"], "cpu").uneven_count == 1
    assert build_mesh(spec, [*"aaaabbcc"], "cpu").uneven_count == 0
