from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.placement.groups import expert_groups


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.integers(1, 6))
def test_groups_hold_every_rank_once_and_fill_nodes_first(nodes, ep):
    nodes = nodes[: len(nodes) // ep * ep]
    groups = expert_groups(nodes, ep)
    assert sorted(rank for group in groups.ranks for rank in group) == list(range(len(nodes)))
    assert all(len(group) == ep for group in groups.ranks)
    whole = sum(nodes.count(node) // ep for node in set(nodes))
    assert len(groups.ranks) - len(groups.straddling) >= whole


def test_six_and_two_free_gpus_give_one_straddling_group_at_most():
    groups = expert_groups(["a"] * 6 + ["b"] * 2, 4)
    assert groups.ranks == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups.straddling == [1]


def test_interleaved_ranks_are_regrouped_by_node():
    assert expert_groups(["a", "b", "a", "b"], 2) == ([[0, 2], [1, 3]], [])
