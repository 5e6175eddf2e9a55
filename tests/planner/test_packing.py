"""Placement forecasts on paper; tests/cluster/test_nodes.py compares them with Ray."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.planner.placement import (
    Kind,
    Node,
    expert_groups,
    laid_out,
    missing_room,
    on_one_node,
    on_paper,
    packed,
)

NODES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8), st.sampled_from("xyz")), min_size=1, max_size=20)


def named(sizes):
    return [Node(f"node{i}", *size) for i, size in enumerate(sizes)]


@given(NODES, st.integers(1, 3), st.integers(0, 1), st.integers(1, 60))
def test_every_worker_that_fits_has_a_place_and_nodes_are_filled_one_by_one(sizes, cpus, gpus, workers):
    nodes = named(sizes)
    places = packed(nodes, cpus, gpus, workers)
    on = Counter(places)
    assert all(count * cpus <= node.cpus and count * gpus <= node.gpus for node, count in on.items())
    assert len(places) == min(workers, sum(node.holds(cpus, gpus) for node in nodes))
    # One run of ranks a node, each full but the last.
    runs = [node for i, node in enumerate(places) if i == 0 or places[i - 1] != node]
    assert len(runs) == len(on)
    assert all(on[node] == node.holds(cpus, gpus) for node in runs[:-1])


@given(NODES, st.integers(1, 8), st.integers(1, 8))
def test_groups_straddle_no_more_than_whole_groups_of_each_node_allow(sizes, ep, groups):
    places = packed(named(sizes), 1, 1, ep * groups)
    places = places[: len(places) // ep * ep]
    layout = laid_out(places, ep)
    whole = sum(count // ep for count in Counter(places).values())
    assert len(layout.groups.ranks) - len(layout.groups.straddling) == whole
    assert sorted(rank for ranks in layout.replicas for rank in ranks) == layout.everyone[0]


def test_six_and_two_free_gpus():
    """Ray fills the node with six GPUs first; one group of 4 then straddles nodes, and the reason to refuse it says
    so."""
    nodes = [Node("small", 8, 2), Node("large", 8, 6)]
    layout = laid_out(packed(nodes, 1, 1, 8), 4)
    assert layout.nodes == ["large"] * 6 + ["small"] * 2
    assert layout.groups.ranks == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups.why_refused == "1 of 2 expert-parallel groups would lie on more than one node"
    assert laid_out(packed(nodes, 1, 1, 4), 4).groups.why_refused is None


def test_scarcer_resources_decide_and_cpus_count_too():
    assert [n.name for n in packed([Node("a", 4, 4), Node("b", 64, 4)], 1, 1, 5)] == ["b"] * 4 + ["a"]
    assert [n.name for n in packed([Node("a", 2, 8), Node("b", 64, 4)], 2, 1, 5)] == ["b"] * 4 + ["a"]
    assert packed([Node("a", 64, 0)], 1, 1, 1) == []


def test_a_thousand_nodes_in_racks_with_some_gpus_taken():
    """The nodes have 8 GPUs each, 2 of them taken on every fourth node, in racks of 12.

    Groups of 4 lie on one node, except for what is left of the nodes with 6 GPUs. Two such nodes make one group, in a
    rack where they can; of three such nodes in a rack one remains.
    """
    nodes = [Node(f"node{i}", 64, 6 if i % 4 == 0 else 8, f"rack{i // 12}") for i in range(1000)]
    world = sum(int(node.gpus) for node in nodes)
    places = packed(nodes, 4, 1, world)
    assert Counter(places) == {node: node.gpus for node in nodes}
    layout = laid_out(places, 4)
    assert len(layout.groups.straddling) == 250 * 2 // 4
    assert len(layout.groups.apart) == 84 * 2 // 4
    wide = laid_out(places[: world // 16 * 16], 16)
    in_racks = sum(count // 16 for count in Counter(wide.domains).values())
    assert len(wide.groups.ranks) - len(wide.groups.apart) == in_racks


def test_nodes_of_mixed_sizes():
    """The nodes have 4, 8 and 2 GPUs, 300 nodes of each size; groups of 8 lie on a node of 8 or on several of the
    others."""
    nodes = [Node(f"n{kind}-{i}", 16, size) for i in range(300) for kind, size in enumerate((4, 8, 2))]
    layout = laid_out(packed(nodes, 1, 1, 300 * 14), 8)
    assert layout.nodes[: 300 * 8] == [f"n1-{i}" for i in range(300) for _ in range(8)]
    assert len(layout.groups.straddling) == 300 * 6 // 8
    assert layout.groups == expert_groups(layout.nodes, 8)


def test_a_cluster_on_paper_is_filled_in_order_and_its_groups_are_spread_alike():
    layout = laid_out(packed(on_paper(1000, 8, 8, nodes_per_domain=50), 1, 1, 8000), 80)
    assert layout.nodes == [f"node{i // 8}" for i in range(8000)]
    assert {frozenset(layout.spread(ranks).values()) for ranks in layout.groups.ranks} == {frozenset([10])}
    assert layout.groups.apart == []
    assert layout.spread(layout.groups.ranks[-1]) == {Kind("domain19", 8): 10}
    assert layout.on_nodes == [list(range(8 * i, 8 * i + 8)) for i in range(1000)]
    assert on_one_node(6, 3).replicas == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("nodes", "workers", "missing"),
    [
        ([Node("a", 8, 0)], 4, "it needs 4 workers with 2 CPUs and 1 GPU each, and the cluster has no GPU"),
        (
            [Node("a", 8, 1), Node("b", 1, 4)],
            2,
            "it needs 2 workers with 2 CPUs and 1 GPU each, and the cluster's 2 nodes with 9 CPUs and 5 GPUs in all "
            "hold 1",
        ),
        ([Node("a", 8, 4)], 4, None),
        ([], 1, "it needs a worker with 2 CPUs and 1 GPU, and the cluster has no GPU"),
    ],
)
def test_room_that_is_missing_is_said_in_numbers(nodes, workers, missing):
    assert missing_room(nodes, 2, 1, workers) == missing
