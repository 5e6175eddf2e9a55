"""Expert-parallel groups, filled node by node, so that the exchange of rows stays inside a node where it can."""

from collections.abc import Sequence
from typing import NamedTuple


class Groups(NamedTuple):
    ranks: list[list[int]]
    """dp groups of ep ranks each; place (i, j) holds expert shard j of replica i."""
    straddling: list[int]
    """Groups whose ranks are on more than one node."""


def expert_groups(nodes: Sequence[str], ep: int) -> Groups:
    """Groups for ranks 0..world-1 of which `nodes[rank]` names the node; world must be a multiple of ep.

    Each node gives as many whole groups as it can, in the order in which nodes first appear; what remains of the nodes
    is joined in the same order.
    """
    assert len(nodes) % ep == 0
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    groups: list[list[int]] = []
    left: list[int] = []
    for ranks in by_node.values():
        whole = len(ranks) // ep * ep
        groups += [ranks[i : i + ep] for i in range(0, whole, ep)]
        left += ranks[whole:]
    groups += [left[i : i + ep] for i in range(0, len(left), ep)]
    return Groups(groups, [i for i, group in enumerate(groups) if len({nodes[r] for r in group}) > 1])
