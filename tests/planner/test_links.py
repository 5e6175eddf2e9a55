"""Bytes by link class against rows drawn and counted one by one, small cases in full, and rings walked hop by hop."""

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.planner.placement import Node, laid_out
from mhmoe_ray.planner.traffic import crossed, dispatches, exchanges, flat, reached, ring, to_nodes, within_nodes
from tests.specs import tiny_spec

CLASSES = ("node", "domain", "between")


def layout_of(sizes, ep, nodes_per_domain=2):
    """Return a layout of ranks on nodes of these sizes."""
    nodes = [Node(f"n{i}", 8, 8, f"d{i // nodes_per_domain}") for i in range(len(sizes))]
    return laid_out([node for node, size in zip(nodes, sizes, strict=True) for _ in range(size)], ep)


def link_between(layout, a, b):
    if layout.nodes[a] == layout.nodes[b]:
        return "node"
    return "domain" if layout.domains[a] == layout.domains[b] else "between"


@pytest.mark.parametrize(("experts", "held", "top_k"), [(6, 2, 3), (8, 4, 2), (5, 1, 5), (7, 3, 1), (6, 5, 2)])
def test_the_chance_that_a_row_goes_to_a_node_is_that_of_all_choices_counted(experts, held, top_k):
    choices = list(itertools.combinations(range(experts), top_k))
    on_it = sum(any(e < held for e in choice) for choice in choices)
    assert reached(experts, held, top_k) == pytest.approx(on_it / len(choices), rel=1e-12)


@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 12))
def test_expected_nodes_lie_between_one_and_top_k_and_are_all_where_every_expert_is_chosen(nodes, each, top_k):
    experts = nodes * each
    top_k = min(top_k, experts)
    expected = nodes * reached(experts, each, top_k)
    assert 1 - 1e-9 <= expected <= min(top_k, nodes) + 1e-9
    assert nodes * reached(experts, each, experts) == nodes
    if top_k == 1:
        assert expected == pytest.approx(1)


SIZES = [([4, 4, 4, 4], 16), ([6, 2, 4, 4], 8), ([3, 3, 3, 3], 4), ([8], 4)]


@pytest.mark.parametrize(("sizes", "ep"), SIZES)
@pytest.mark.parametrize("dispatch", ["flat", "hierarchical"])
def test_rows_over_each_link_are_those_of_drawn_routing(sizes, ep, dispatch):
    """Every token's rows are walked from rank to rank.

    Hierarchical dispatch between nodes of unequal sizes is right on average.
    """
    random.seed(0)
    layout = layout_of(sizes, ep)
    experts, top_k, tokens = 48, 3, 1500
    seen = Counter()
    for group in layout.groups.ranks:
        home = {e: group[e * ep // experts] for e in range(experts)}
        members = {}
        for rank in group:
            members.setdefault(layout.nodes[rank], []).append(rank)
        for rank in group:
            own = members[layout.nodes[rank]]
            for _ in range(tokens):
                ranks = [home[e] for e in random.sample(range(experts), top_k)]
                if dispatch == "flat":
                    seen.update(link_between(layout, rank, there) for there in ranks if there != rank)
                    continue
                for node in {layout.nodes[there] for there in ranks}:
                    entry = members[node][own.index(rank) % len(members[node])] if node != layout.nodes[rank] else rank
                    if entry != rank:
                        seen[f"{link_between(layout, rank, entry)}, by node"] += 1
                    here = [there for there in ranks if layout.nodes[there] == node and there != entry]
                    seen["node"] += len(here)
    groups = [layout.spread(ranks) for ranks in layout.groups.ranks]
    rows = tokens * len(layout.nodes)
    if dispatch == "flat":
        links = crossed(groups, flat).of(top_k * rows)
        expected = dict(zip(CLASSES, (s.mean for s in links), strict=True))
    else:
        by_node = crossed(groups, to_nodes(lambda n, of: reached(experts, experts * n // of, top_k))).of(rows)
        expected = {"node": crossed(groups, within_nodes).of(top_k * rows).node.mean}
        expected |= {f"{name}, by node": s.mean for name, s in zip(CLASSES, by_node, strict=True)}
    for name, count in expected.items():
        # Five standard deviations, were each row's way drawn by itself.
        assert seen[name] == pytest.approx(count, abs=5 * math.sqrt(count) + 1, rel=0), name
    assert not seen.keys() - expected.keys()


@pytest.mark.parametrize(("sizes", "ep"), SIZES)
def test_rings_cross_the_links_that_a_walk_from_rank_to_rank_does(sizes, ep):
    """There is one ring for each rank of a node, and from ring to ring the ranks of each node are turned by one."""
    layout = layout_of(sizes, ep)
    everyone = sorted(range(len(layout.nodes)), key=lambda r: (layout.domains[r], layout.nodes[r]))
    on = [[r for r in everyone if layout.nodes[r] == node] for node in dict.fromkeys(layout.nodes[r] for r in everyone)]
    turns = math.lcm(*map(len, on))
    sent = {name: Counter() for name in CLASSES}
    for turn in range(turns):
        walk = [ranks[(i + turn) % len(ranks)] for ranks in on for i in range(len(ranks))]
        for a, b in zip(walk, [*walk[1:], walk[0]], strict=True):
            sent[link_between(layout, a, b)][a] += 1 / turns
    links = crossed([layout.spread(everyone)], ring)
    for name, sends in zip(CLASSES, links, strict=True):
        assert sends.mean == pytest.approx(sum(sent[name].values()) / len(everyone))
        most = max(sent[name].values(), default=0)
        if len(set(sizes)) == 1:
            assert sends.most == pytest.approx(most)
        else:  # which nodes of a domain are its ends is not known, and what leaves 6 ranks may have to enter by 2
            assert sends.most >= most - 1e-9
    assert sum(s.messages for s in links) == len(everyone) - 1


def test_a_run_on_one_node_uses_its_links_alone_and_what_is_sent_is_what_crosses():
    spec = tiny_spec(cluster={"workers": 4, "ep": 2})
    for exchange in exchanges(spec):
        assert exchange.links.node.mean == pytest.approx(exchange.sent, abs=1)
        assert exchange.links.domain.mean == exchange.links.between.mean == 0
    layout = layout_of([1, 1, 1, 1], 2, nodes_per_domain=1)
    for exchange in exchanges(spec, layout):
        assert exchange.links.between.mean == pytest.approx(exchange.sent, abs=1)
        assert exchange.links.node.mean == exchange.links.domain.mean == 0


def test_hierarchical_dispatch_is_flat_within_a_node_and_sends_a_row_once_to_each_other():
    cluster = {"workers": 4, "ep": 4, "dispatch": "hierarchical"}
    spec = tiny_spec(cluster=cluster)
    assert dispatches(spec) == dispatches(tiny_spec(cluster={**cluster, "dispatch": "flat"}))
    counts, inner, *ways = dispatches(spec, layout_of([2, 2], 4))
    assert (counts.sent, inner.sent) == (16, 8)  # two numbers for the other node, one for the neighbour's expert
    tokens, d, h, k = 2 * 16, 32, 2, 2
    back = next(e for e in ways if e.name == "outputs back, by node")
    # 2 of 4 experts, two on each node: of six choices one misses the other node.
    assert back.sent == round(tokens * d * 4 * 5 / 6)
    there = next(e for e in ways if e.name == "rows to experts, by node")
    assert there.sent == round((tokens * d * 4 + tokens * h * k * 8) * 5 / 6)
    assert [e.links.node.mean for e in ways[1::2]] == [tokens * k * d * 4 / 2] * 4
    noisy = tiny_spec(model={**spec.model.model_dump(), "dropout": 0.1}, cluster=cluster)
    routes = next(e for e in dispatches(noisy, layout_of([2, 2], 4)) if e.name == "outputs back, by node")
    assert routes.sent == tokens * k * d * 4 / 2  # each by itself, half of them away


def test_a_group_with_unequal_shares_of_its_nodes_stays_flat():
    flat_, rails = (tiny_spec(cluster={"workers": 4, "ep": 4, "dispatch": d}) for d in ("flat", "hierarchical"))
    uneven = layout_of([3, 1], 4)
    assert dispatches(rails, uneven) == dispatches(flat_, uneven)
    # One group of each kind: over nodes of 2 and 2, and of 3 and 1.
    wide = tiny_spec(cluster={"workers": 8, "ep": 4, "dispatch": "hierarchical"}, train={"micro_batches": 8})
    both = layout_of([2, 2, 3, 1], 4)
    assert [len({both.nodes[r] for r in ranks}) for ranks in both.groups.ranks] == [2, 2]
    mixed = {e.name: e for e in dispatches(wide, both)}
    even = {e.name: e for e in dispatches(rails, layout_of([2, 2], 4))}
    straight = {e.name: e for e in dispatches(flat_, uneven)}
    for way in ("outputs back", "gradients of outputs to experts"):
        by_node = even[f"{way}, by node"].links.domain.mean
        assert mixed[f"{way}, by node"].links.domain.mean == (by_node + straight[way].links.domain.mean) / 2
        assert mixed[f"{way}, within nodes"].sent == even[f"{way}, within nodes"].sent / 2
