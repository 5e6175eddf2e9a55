from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.planner.placement import expert_groups, ranks_by_node


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.integers(1, 6))
def test_groups_hold_every_rank_once_and_fill_nodes_first(nodes, ep):
    nodes = nodes[: len(nodes) // ep * ep]
    groups = expert_groups(nodes, ep)
    assert sorted(rank for group in groups.ranks for rank in group) == list(range(len(nodes)))
    assert all(len(group) == ep for group in groups.ranks)
    # torch numbers the ranks of a group in ascending order.
    assert all(group == sorted(group) for group in groups.ranks)
    possible_groups = sum(nodes.count(node) // ep for node in set(nodes))
    assert len(groups.ranks) - len(groups.straddling_indices) >= possible_groups


def test_six_and_two_free_gpus_give_one_straddling_group_at_most():
    groups = expert_groups(["a"] * 6 + ["b"] * 2, 4)
    assert groups.ranks == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups.straddling_indices == [1]
    assert groups.cross_domain_indices == []


def test_interleaved_ranks_are_regrouped_by_node():
    assert expert_groups(["a", "b", "a", "b"], 2) == ([[0, 2], [1, 3]], [], [])


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("abc")), min_size=1, max_size=60), st.integers(1, 8))
def test_domains_are_filled_before_groups_lie_in_several(locations, ep):
    locations = locations[: len(locations) // ep * ep]
    domains, nodes = [d for d, _ in locations], [d + n for d, n in locations]
    groups = expert_groups(nodes, ep, domains)
    assert sorted(rank for group in groups.ranks for rank in group) == list(range(len(nodes)))
    groups_on_nodes = sum(nodes.count(node) // ep for node in set(nodes))
    groups_in_domains = sum(domains.count(domain) // ep for domain in set(domains))
    assert len(groups.ranks) - len(groups.straddling_indices) >= groups_on_nodes
    assert len(groups.ranks) - len(groups.cross_domain_indices) == groups_in_domains
    assert set(groups.cross_domain_indices) <= set(groups.straddling_indices)


def test_groups_of_remaining_ranks_stay_in_their_rack():
    """The two racks have two nodes with 6 free GPUs each, and groups have 4 ranks."""
    nodes = [f"node{n}" for n in range(4) for _ in range(6)]
    domains = ["rack0"] * 12 + ["rack1"] * 12
    groups = expert_groups(nodes, 4, domains)
    assert [len(groups.straddling_indices), len(groups.cross_domain_indices)] == [2, 0]
    assert [4, 5, 10, 11] in groups.ranks
    shuffled = [nodes[i * 7 % 24] for i in range(24)], [domains[i * 7 % 24] for i in range(24)]
    assert [len(part) for part in expert_groups(shuffled[0], 4, shuffled[1])[1:]] == [2, 0]


def test_groups_on_a_thousand_nodes_stay_in_their_racks():
    """The nodes have 8 GPUs each, with 16 nodes in a rack.

    A group of 64 needs 8 nodes, so that each rack has two groups.
    """
    nodes = [f"node{n}" for n in range(1024) for _ in range(8)]
    domains = [f"rack{n // 16}" for n in range(1024) for _ in range(8)]
    groups = expert_groups(nodes, 64, domains)
    assert len(groups.ranks) == 128
    assert groups.cross_domain_indices == []
    node_groups = expert_groups(nodes, 8, domains)
    assert node_groups.straddling_indices == []


def test_a_group_is_a_grid_if_its_nodes_have_equally_many_consecutive_ranks():
    assert ranks_by_node([4, 5, 10, 11], ["a"] * 6 + ["b"] * 6) == [[4, 5], [10, 11]]
    assert ranks_by_node([0, 1, 2], ["a"] * 3) == [[0, 1, 2]]
    assert ranks_by_node([0, 1], ["a", "b"]) == [[0], [1]]
    assert ranks_by_node([0, 1, 2], ["a", "a", "b"]) is None
    assert ranks_by_node([0, 1, 2, 3], ["a", "b", "b", "a"]) is None
