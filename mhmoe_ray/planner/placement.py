"""Which node Ray puts each rank on, and which ranks form an expert-parallel group. No torch, no ray.

Groups are filled node by node, then domain by domain, so that rows are exchanged over the fastest links. Packing is a
forecast, to be shown before a run starts.
"""

from collections import Counter
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


def missing_room(nodes: "Sequence[Node]", cpus: int, gpus: int, workers: int) -> str | None:
    """Return what a cluster lacks for so many workers, in one line; None if it can hold them.

    Args:
        nodes: with all that they have.
        cpus, gpus: of each worker.
        workers: the fewest that can start.
    """
    held = len(packed(nodes, cpus, gpus, workers))
    if held >= workers:
        return None
    each = f"{cpus} CPU{'s' if cpus > 1 else ''}" + (f" and {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "")
    count = f"{workers} workers with {each} each" if workers > 1 else f"a worker with {each}"
    if gpus and not any(node.gpus for node in nodes):
        return f"it needs {count}, and the cluster has no GPU"
    total = " and ".join(
        f"{sum(getattr(node, kind) for node in nodes):g} {name}s" for kind, name in (("cpus", "CPU"), ("gpus", "GPU"))
    )
    return f"it needs {count}, and the cluster's {len(nodes)} nodes with {total} in all hold {held}"


class Node(NamedTuple):
    name: str
    cpus: float
    """Free."""
    gpus: float
    """Free."""
    domain: str = ""
    """What a faster network joins it to; nodes without one are one domain."""

    def holds(self, cpus: int, gpus: int) -> int:
        """Workers that fit, each with so many of both."""
        return int(min(self.cpus // cpus, self.gpus // gpus) if gpus else self.cpus // cpus)


def packed(nodes: Sequence[Node], cpus: int, gpus: int, workers: int) -> list[Node]:
    """The node of each rank; of fewer ranks where the nodes hold no more.

    As Ray packs a placement group of equal bundles (BundlePackSchedulingPolicy of its
    src/ray/raylet/scheduling/policy), which is what Ray Train asks for: first the node of which one worker would leave
    the greatest share, filled before the next. Among equals Ray's order is arbitrary; here it is the given one. Ray
    Train numbers ranks node by node.

    Args:
        nodes: with what is free on them.
        cpus: of each worker.
        gpus: of each worker.
        workers: of all.
    """

    def left(node: Node) -> float:
        shares = [(node.cpus - cpus) / node.cpus] + ([(node.gpus - gpus) / node.gpus] if gpus else [])
        return sum(shares)

    able = [node for node in nodes if node.holds(cpus, gpus)]
    places = [node for node in sorted(able, key=left, reverse=True) for _ in range(node.holds(cpus, gpus))]
    return places[:workers]


def on_paper(nodes: int, cpus: int, gpus: int, nodes_per_domain: int | None = None) -> list[Node]:
    """Equal nodes that are not there, in domains of so many, or all in one."""
    domains = [f"domain{i // nodes_per_domain}" if nodes_per_domain else "" for i in range(nodes)]
    return [Node(f"node{i}", cpus, gpus, domain) for i, domain in enumerate(domains)]


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
