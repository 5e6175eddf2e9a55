"""Tests of planned bytes per class of links, against random rows that are counted one by one, and against rings that
are followed from rank to rank."""

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.planner.placement import Node, build_layout
from mhmoe_ray.planner.traffic import (
    all_exchanges,
    all_to_all_pattern,
    dispatch_exchanges,
    group_loads,
    hit_probability,
    ring_pattern,
    to_nodes_pattern,
    within_nodes_pattern,
)
from tests.support.specs import tiny_spec

CLASSES = ("node", "domain", "between")


def layout_of(sizes, ep, nodes_per_domain=2):
    """Return a layout with `sizes[i]` ranks on node i, and expert-parallel groups of `ep` ranks."""
    nodes = [Node(f"n{i}", 8, 8, f"d{i // nodes_per_domain}") for i in range(len(sizes))]
    return build_layout([node for node, size in zip(nodes, sizes, strict=True) for _ in range(size)], ep)


def link_between(layout, a, b):
    """Return the class of the link between ranks a and b."""
    if layout.nodes[a] == layout.nodes[b]:
        return "node"
    return "domain" if layout.domains[a] == layout.domains[b] else "between"


@pytest.mark.parametrize(("experts", "local_experts", "top_k"), [(6, 2, 3), (8, 4, 2), (5, 1, 5), (7, 3, 1), (6, 5, 2)])
def test_the_hit_probability_is_the_share_of_all_choices(experts, local_experts, top_k):
    choices = list(itertools.combinations(range(experts), top_k))
    hits = sum(any(e < local_experts for e in choice) for choice in choices)
    assert hit_probability(experts, local_experts, top_k) == pytest.approx(hits / len(choices), rel=1e-12)


@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 12))
def test_the_expected_number_of_nodes_is_between_one_and_top_k(nodes, experts_per_node, top_k):
    experts = nodes * experts_per_node
    top_k = min(top_k, experts)
    expected = nodes * hit_probability(experts, experts_per_node, top_k)
    assert 1 - 1e-9 <= expected <= min(top_k, nodes) + 1e-9
    assert nodes * hit_probability(experts, experts_per_node, experts) == nodes
    if top_k == 1:
        assert expected == pytest.approx(1)


SIZES = [([4, 4, 4, 4], 16), ([6, 2, 4, 4], 8), ([3, 3, 3, 3], 4), ([8], 4)]


@pytest.mark.parametrize(("sizes", "ep"), SIZES)
@pytest.mark.parametrize("dispatch", ["flat", "hierarchical"])
def test_rows_over_each_link_are_those_of_drawn_routing(sizes, ep, dispatch):
    """Planned rows per link class agree with those of randomly routed tokens, which are followed from rank to rank.

    For hierarchical dispatch between nodes of unequal sizes, the plan is exact on average.
    """
    random.seed(0)
    layout = layout_of(sizes, ep)
    experts, top_k, tokens = 48, 3, 1500
    crossings = Counter()
    for group in layout.groups.ranks:
        rank_of_expert = {e: group[e * ep // experts] for e in range(experts)}
        members = {}
        for rank in group:
            members.setdefault(layout.nodes[rank], []).append(rank)
        for rank in group:
            node_members = members[layout.nodes[rank]]
            for _ in range(tokens):
                ranks = [rank_of_expert[e] for e in random.sample(range(experts), top_k)]
                if dispatch == "flat":
                    crossings.update(link_between(layout, rank, target) for target in ranks if target != rank)
                    continue
                for node in {layout.nodes[target] for target in ranks}:
                    entry = (
                        members[node][node_members.index(rank) % len(members[node])]
                        if node != layout.nodes[rank]
                        else rank
                    )
                    if entry != rank:
                        crossings[f"{link_between(layout, rank, entry)}, by node"] += 1
                    local_targets = [target for target in ranks if layout.nodes[target] == node and target != entry]
                    crossings["node"] += len(local_targets)
    groups = [layout.spread(ranks) for ranks in layout.groups.ranks]
    rows = tokens * len(layout.nodes)
    if dispatch == "flat":
        links = group_loads(groups, all_to_all_pattern).scaled(top_k * rows)
        expected = dict(zip(CLASSES, (s.mean for s in links), strict=True))
    else:
        by_node = group_loads(
            groups,
            to_nodes_pattern(
                lambda ranks_on_node, all_ranks: hit_probability(experts, experts * ranks_on_node // all_ranks, top_k)
            ),
        ).scaled(rows)
        expected = {"node": group_loads(groups, within_nodes_pattern).scaled(top_k * rows).node.mean}
        expected |= {f"{name}, by node": s.mean for name, s in zip(CLASSES, by_node, strict=True)}
    for name, count in expected.items():
        # The tolerance is five standard deviations of the number of independently drawn rows.
        assert crossings[name] == pytest.approx(count, abs=5 * math.sqrt(count) + 1, rel=0), name
    assert not crossings.keys() - expected.keys()


@pytest.mark.parametrize(("sizes", "ep"), SIZES)
def test_rings_cross_the_links_of_a_walk_from_rank_to_rank(sizes, ep):
    """Planned shares per link class agree with those of rings that are followed from rank to rank.

    From one ring to the next, the ranks of each node are rotated by one, so that each of them is once the node's exit.
    """
    layout = layout_of(sizes, ep)
    all_ranks = sorted(range(len(layout.nodes)), key=lambda r: (layout.domains[r], layout.nodes[r]))
    ranks_by_node = [
        [r for r in all_ranks if layout.nodes[r] == node] for node in dict.fromkeys(layout.nodes[r] for r in all_ranks)
    ]
    turns = math.lcm(*map(len, ranks_by_node))
    sent_bytes = {name: Counter() for name in CLASSES}
    for turn in range(turns):
        walk = [ranks[(i + turn) % len(ranks)] for ranks in ranks_by_node for i in range(len(ranks))]
        for a, b in zip(walk, [*walk[1:], walk[0]], strict=True):
            sent_bytes[link_between(layout, a, b)][a] += 1 / turns
    links = group_loads([layout.spread(all_ranks)], ring_pattern)
    for name, load in zip(CLASSES, links, strict=True):
        assert load.mean == pytest.approx(sum(sent_bytes[name].values()) / len(all_ranks))
        largest_amount = max(sent_bytes[name].values(), default=0)
        if len(set(sizes)) == 1:
            assert load.maximum == pytest.approx(largest_amount)
        else:
            # The plan has only an upper bound: it knows neither from which rank a ring leaves a domain, nor how many
            # ranks send into a smaller node.
            assert load.maximum >= largest_amount - 1e-9
    assert sum(s.messages for s in links) == len(all_ranks) - 1


def test_sent_bytes_cross_the_links_of_a_single_class():
    """All bytes stay within nodes if there is one node, and cross domains if each rank is in a domain of its own."""
    spec = tiny_spec(cluster={"workers": 4, "ep": 2})
    for exchange in all_exchanges(spec):
        assert exchange.links.node.mean == pytest.approx(exchange.sent_bytes, abs=1)
        assert exchange.links.domain.mean == exchange.links.between.mean == 0
    layout = layout_of([1, 1, 1, 1], 2, nodes_per_domain=1)
    for exchange in all_exchanges(spec, layout):
        assert exchange.links.between.mean == pytest.approx(exchange.sent_bytes, abs=1)
        assert exchange.links.node.mean == exchange.links.domain.mean == 0


def test_hierarchical_dispatch_sends_a_row_once_to_each_other_node():
    cluster = {"workers": 4, "ep": 4, "dispatch": "hierarchical"}
    spec = tiny_spec(cluster=cluster)
    assert dispatch_exchanges(spec) == dispatch_exchanges(tiny_spec(cluster={**cluster, "dispatch": "flat"}))
    counts, node_counts, *row_exchanges = dispatch_exchanges(spec, layout_of([2, 2], 4))
    # A rank sends two int64 numbers to the other node, and to its neighbour one number for the neighbour's expert.
    assert (counts.sent_bytes, node_counts.sent_bytes) == (16, 8)
    tokens, d, h, k = 2 * 16, 32, 2, 2
    outputs = next(e for e in row_exchanges if e.name == "outputs back, by node")
    # A row is sent to the other node if one of its two experts is there. Each node has two of the four experts, so one
    # of the six possible choices of two experts needs no expert of the other node.
    assert outputs.sent_bytes == round(tokens * d * 4 * 5 / 6)
    rows = next(e for e in row_exchanges if e.name == "rows to experts, by node")
    assert rows.sent_bytes == round((tokens * d * 4 + tokens * h * k * 8) * 5 / 6)
    assert [e.links.node.mean for e in row_exchanges[1::2]] == [tokens * k * d * 4 / 2] * 4
    noisy = tiny_spec(model={**spec.model.model_dump(), "dropout": 0.1}, cluster=cluster)
    routes = next(e for e in dispatch_exchanges(noisy, layout_of([2, 2], 4)) if e.name == "outputs back, by node")
    # With dropout, the output of each route is sent back separately, and half of the routes go to experts of the
    # other node.
    assert routes.sent_bytes == tokens * k * d * 4 / 2


def test_a_group_with_unequal_shares_of_its_nodes_stays_flat():
    flat_spec, hierarchical_spec = (
        tiny_spec(cluster={"workers": 4, "ep": 4, "dispatch": d}) for d in ("flat", "hierarchical")
    )
    uneven = layout_of([3, 1], 4)
    assert dispatch_exchanges(hierarchical_spec, uneven) == dispatch_exchanges(flat_spec, uneven)
    # Of the two groups, one has two ranks on each of its two nodes, so it is hierarchical. The other has three ranks on
    # one node and one on another, so it stays flat.
    wide = tiny_spec(cluster={"workers": 8, "ep": 4, "dispatch": "hierarchical"}, train={"micro_batches": 8})
    two_groups = layout_of([2, 2, 3, 1], 4)
    assert [len({two_groups.nodes[r] for r in ranks}) for ranks in two_groups.groups.ranks] == [2, 2]
    mixed = {e.name: e for e in dispatch_exchanges(wide, two_groups)}
    even = {e.name: e for e in dispatch_exchanges(hierarchical_spec, layout_of([2, 2], 4))}
    flat_exchanges = {e.name: e for e in dispatch_exchanges(flat_spec, uneven)}
    for stage in ("outputs back", "gradients of outputs to experts"):
        by_node = even[f"{stage}, by node"].links.domain.mean
        assert mixed[f"{stage}, by node"].links.domain.mean == (by_node + flat_exchanges[stage].links.domain.mean) / 2
        assert mixed[f"{stage}, within nodes"].sent_bytes == even[f"{stage}, within nodes"].sent_bytes / 2
