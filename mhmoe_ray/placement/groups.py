"""Expert-parallel groups, filled node by node, then domain by domain: rows are exchanged over the fastest links."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple


class Groups(NamedTuple):
    ranks: list[list[int]]
    """dp groups of ep ranks each; place (i, j) holds expert shard j of replica i. Ascending within a group, as torch
    numbers the ranks of a process group whatever order it is given."""
    straddling: list[int]
    """Groups whose ranks are on more than one node."""
    apart: list[int]
    """Those of them whose nodes are in more than one domain."""

    @property
    def why_refused(self) -> str | None:
        """Where `cluster.straddling` is refuse, why these groups are; None if they are not."""
        if not self.straddling:
            return None
        of_all = f"{len(self.straddling)} of {len(self.ranks)}"
        return f"{of_all} expert-parallel groups would lie on more than one node"


def expert_groups(nodes: Sequence[str], ep: int, domains: Sequence[str] | None = None) -> Groups:
    """Groups for ranks 0..world-1; world must be a multiple of ep.

    Each node gives as many whole groups as it can; what remains of the nodes of a domain is joined to whole groups; and
    what remains of the domains is joined. All in the order in which nodes and domains first appear.

    Args:
        nodes: for each rank, the name of its node.
        ep: ranks of a group.
        domains: for each rank, the name of the domain (a rack, an NVLink domain) that its node is in; by default all
            are in one.
    """
    assert len(nodes) % ep == 0
    domains = domains or [""] * len(nodes)
    groups: list[list[int]] = []
    left = list(range(len(nodes)))
    for places in (list(zip(domains, nodes, strict=True)), list(domains), [""] * len(nodes)):
        whole, left = _filled(left, places, ep)
        groups += map(sorted, whole)
    return Groups(groups, _on_several(groups, nodes), _on_several(groups, domains))


def by_node(group: Sequence[int], nodes: Sequence[str]) -> list[list[int]] | None:
    """The ranks of a group as one list a node, equally long and in the group's order; None where there is no such
    layout, since nodes have unequally many of them or others between."""
    runs = [list(ranks) for _, ranks in groupby(group, key=lambda rank: nodes[rank])]
    whole = len(runs) == len({nodes[rank] for rank in group}) and len({len(ranks) for ranks in runs}) == 1
    return runs if whole else None


def _filled(ranks: Iterable[int], places: Sequence[object], ep: int) -> tuple[list[list[int]], list[int]]:
    """Whole groups of ranks in one place each, and the ranks that remain, place by place."""
    by_place: dict[object, list[int]] = {}
    for rank in ranks:
        by_place.setdefault(places[rank], []).append(rank)
    groups: list[list[int]] = []
    left: list[int] = []
    for there in by_place.values():
        whole = len(there) // ep * ep
        groups += [there[i : i + ep] for i in range(0, whole, ep)]
        left += there[whole:]
    return groups, left


def _on_several(groups: list[list[int]], places: Sequence[str]) -> list[int]:
    return [i for i, group in enumerate(groups) if len({places[rank] for rank in group}) > 1]
