"""Tests of predicted placements on hypothetical nodes; tests/cluster/test_nodes.py compares predictions with Ray."""

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.planner.placement import (
    Node,
    NodeKind,
    build_layout,
    capacity_shortfall,
    expert_groups,
    hypothetical_nodes,
    pack_workers,
    plan_workers,
    single_node_layout,
)

NODES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8), st.sampled_from("xyz")), min_size=1, max_size=20)


def nodes_of(sizes):
    """Return a node for each (CPUs, GPUs, domain) of `sizes`."""
    return [Node(f"node{i}", *size) for i, size in enumerate(sizes)]


@given(NODES, st.integers(1, 3), st.integers(0, 1), st.integers(1, 60))
def test_every_worker_that_fits_has_a_place_and_nodes_are_filled_one_by_one(sizes, cpus, gpus, workers):
    nodes = nodes_of(sizes)
    rank_nodes = pack_workers(nodes, cpus, gpus, workers)
    worker_counts = Counter(rank_nodes)
    assert all(count * cpus <= node.cpus and count * gpus <= node.gpus for node, count in worker_counts.items())
    assert len(rank_nodes) == min(workers, sum(node.worker_capacity(cpus, gpus) for node in nodes))
    # The workers of each node have consecutive ranks, and every node is full except for the last one.
    runs = [node for i, node in enumerate(rank_nodes) if i == 0 or rank_nodes[i - 1] != node]
    assert len(runs) == len(worker_counts)
    assert all(worker_counts[node] == node.worker_capacity(cpus, gpus) for node in runs[:-1])


@given(NODES, st.integers(1, 8), st.integers(1, 8))
def test_groups_straddle_no_more_than_whole_groups_of_each_node_allow(sizes, ep, groups):
    rank_nodes = pack_workers(nodes_of(sizes), 1, 1, ep * groups)
    rank_nodes = rank_nodes[: len(rank_nodes) // ep * ep]
    layout = build_layout(rank_nodes, ep)
    groups_on_nodes = sum(count // ep for count in Counter(rank_nodes).values())
    assert len(layout.groups.ranks) - len(layout.groups.straddling_indices) == groups_on_nodes
    assert sorted(rank for ranks in layout.data_parallel_groups for rank in ranks) == list(range(len(layout.nodes)))


def test_group_of_four_spans_nodes_with_six_and_two_free_gpus():
    """Ray fills the node with six GPUs first. One group of 4 then spans both nodes, which is a reason to refuse the
    groups."""
    nodes = [Node("small", 8, 2), Node("large", 8, 6)]
    layout = build_layout(pack_workers(nodes, 1, 1, 8), 4)
    assert layout.nodes == ["large"] * 6 + ["small"] * 2
    assert layout.groups.ranks == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups.refusal_reason == "1 of 2 expert-parallel groups would lie on more than one node"
    assert build_layout(pack_workers(nodes, 1, 1, 4), 4).groups.refusal_reason is None


def test_scarcer_resources_decide_and_cpus_count_too():
    assert [n.name for n in pack_workers([Node("a", 4, 4), Node("b", 64, 4)], 1, 1, 5)] == ["b"] * 4 + ["a"]
    assert [n.name for n in pack_workers([Node("a", 2, 8), Node("b", 64, 4)], 2, 1, 5)] == ["b"] * 4 + ["a"]
    assert pack_workers([Node("a", 64, 0)], 1, 1, 1) == []


def test_few_groups_straddle_on_a_thousand_nodes_with_some_gpus_taken():
    """The nodes have 8 free GPUs each, except every fourth node, which has 6, and they are in racks of 12 nodes.

    Groups of 4 are on one node, except for the two remaining ranks of each node with 6 GPUs. The remaining ranks of two
    such nodes form one group, in the same rack if possible. A full rack has three such nodes, so the ranks of one of
    them form a group with those of a node in another rack.
    """
    nodes = [Node(f"node{i}", 64, 6 if i % 4 == 0 else 8, f"rack{i // 12}") for i in range(1000)]
    world = sum(int(node.gpus) for node in nodes)
    rank_nodes = pack_workers(nodes, 4, 1, world)
    assert Counter(rank_nodes) == {node: node.gpus for node in nodes}
    layout = build_layout(rank_nodes, 4)
    assert len(layout.groups.straddling_indices) == 250 * 2 // 4
    assert len(layout.groups.cross_domain_indices) == 84 * 2 // 4
    wide = build_layout(rank_nodes[: world // 16 * 16], 16)
    in_racks = sum(count // 16 for count in Counter(wide.domains).values())
    assert len(wide.groups.ranks) - len(wide.groups.cross_domain_indices) == in_racks


def test_groups_on_nodes_of_mixed_sizes_straddle_only_smaller_nodes():
    """The nodes have 4, 8 and 2 GPUs, 300 nodes of each size. Groups of 8 are on a node of 8 or on smaller nodes."""
    nodes = [Node(f"n{kind}-{i}", 16, size) for i in range(300) for kind, size in enumerate((4, 8, 2))]
    layout = build_layout(pack_workers(nodes, 1, 1, 300 * 14), 8)
    assert layout.nodes[: 300 * 8] == [f"n1-{i}" for i in range(300) for _ in range(8)]
    assert len(layout.groups.straddling_indices) == 300 * 6 // 8
    assert layout.groups == expert_groups(layout.nodes, 8)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.just(0), st.sampled_from("xyz")), max_size=5), st.integers(1, 4), st.data()
)
def test_no_plan_has_fewer_groups_across_nodes_and_then_across_domains(sizes, ep, data):
    """The plan is compared with all possible numbers of ranks on the nodes."""
    nodes = nodes_of(sizes)
    workers = ep * data.draw(st.integers(0, sum(int(node.cpus) for node in nodes) // ep))

    def spanning_groups(rank_nodes):
        groups = build_layout(rank_nodes, ep).groups
        return len(groups.straddling_indices), len(groups.cross_domain_indices)

    plan = plan_workers(nodes, 1, 0, workers, ep)
    assert all(count <= node.cpus for node, count in Counter(plan).items())
    assert len(plan) == workers
    assert spanning_groups(plan) == min(
        spanning_groups([node for node, count in zip(nodes, counts, strict=True) for _ in range(count)])
        for counts in product(*(range(int(node.cpus) + 1) for node in nodes))
        if sum(counts) == workers
    )


def test_a_plan_uses_few_domains_and_nodes():
    """Both groups of 4 fit in rack b, on one node, and four more workers in the smallest place that holds them."""
    nodes = [Node("a", 8, 7, "a"), Node("b", 8, 4, "b"), Node("c", 16, 8, "b"), Node("d", 8, 5, "c")]
    assert Counter(n.name for n in plan_workers(nodes, 1, 1, 8, 4)) == {"c": 8}
    assert Counter(n.name for n in plan_workers(nodes, 1, 1, 12, 4)) == {"b": 4, "c": 8}
    assert Counter(n.name for n in plan_workers(nodes, 1, 1, 4, 4)) == {"d": 4}
    assert len(plan_workers(nodes, 1, 1, 28, 4)) == 24


def test_hypothetical_cluster_is_filled_in_order_and_its_groups_are_spread_alike():
    layout = build_layout(pack_workers(hypothetical_nodes(1000, 8, 8, nodes_per_domain=50), 1, 1, 8000), 80)
    assert layout.nodes == [f"node{i // 8}" for i in range(8000)]
    assert {frozenset(layout.spread(ranks).values()) for ranks in layout.groups.ranks} == {frozenset([10])}
    assert layout.groups.cross_domain_indices == []
    assert layout.spread(layout.groups.ranks[-1]) == {NodeKind("domain19", 8): 10}
    assert layout.node_groups == [list(range(8 * i, 8 * i + 8)) for i in range(1000)]
    assert single_node_layout(6, 3).data_parallel_groups == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
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
def test_a_capacity_shortfall_is_stated_in_numbers(nodes, workers, expected):
    assert capacity_shortfall(nodes, 2, 1, workers) == expected
