"""Ranks on nodes and in groups, and how a group of them is spread."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from mhmoe_ray.placement.groups import Groups, expert_groups
from mhmoe_ray.placement.packing import Node


class Kind(NamedTuple):
    """What is alike in nodes of a group."""

    domain: str
    ranks: int
    """Of the group, on such a node."""


Spread = Counter[Kind]
"""How many nodes of each kind a group lies on."""


class Layout(NamedTuple):
    nodes: list[str]
    """Of each rank."""
    domains: list[str]
    """Of each rank."""
    groups: Groups

    def spread(self, ranks: Sequence[int]) -> Spread:
        on = Counter((self.domains[rank], self.nodes[rank]) for rank in ranks)
        return Counter(Kind(domain, count) for (domain, _), count in on.items())

    @property
    def everyone(self) -> list[list[int]]:
        """The one group of all ranks."""
        return [list(range(len(self.nodes)))]

    @property
    def replicas(self) -> list[list[int]]:
        """Data-parallel groups: ranks that hold the same experts."""
        return [list(ranks) for ranks in zip(*self.groups.ranks, strict=True)]

    @property
    def on_nodes(self) -> list[list[int]]:
        """Ranks of each node."""
        of: dict[str, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            of.setdefault(node, []).append(rank)
        return list(of.values())


def laid_out(places: Sequence[Node], ep: int) -> Layout:
    """The layout of ranks on these nodes, one for each rank; their number must be a multiple of ep."""
    nodes, domains = [node.name for node in places], [node.domain for node in places]
    return Layout(nodes, domains, expert_groups(nodes, ep, domains))


def on_one_node(workers: int, ep: int) -> Layout:
    return laid_out([Node("node", workers, workers)] * workers, ep)
