"""Placement of ranks on nodes by Ray, and the ranks of each expert-parallel group. No torch, no ray.

Groups are filled node by node, then domain by domain, so that rows are exchanged over the fastest links. The packing
predicts what Ray will do; it is shown before a run starts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple


class Groups(NamedTuple):
    ranks: list[list[int]]
    """dp groups of ep ranks each; the rank at place (i, j) holds expert shard j of replica i. Ranks ascend within a
    group, because torch numbers the ranks of a process group in ascending order, whatever order it is given."""
    straddling: list[int]
    """Indices of the groups whose ranks are on more than one node."""
    apart: list[int]
    """Indices of the groups whose ranks are in more than one domain."""

    @property
    def why_refused(self) -> str | None:
        """Reason to refuse these groups when `cluster.straddling` is refuse; None if there is none."""
        if not self.straddling:
            return None
        of_all = f"{len(self.straddling)} of {len(self.ranks)}"
        return f"{of_all} expert-parallel groups would lie on more than one node"


def expert_groups(nodes: Sequence[str], ep: int, domains: Sequence[str] | None = None) -> Groups:
    """Return the expert-parallel groups of ranks 0..world-1; world must be a multiple of ep.

    Each node forms as many whole groups as it can. The remaining ranks of the nodes of a domain are then joined to
    whole groups, and finally the remaining ranks of all domains. Nodes and domains are taken in the order in which they
    first appear.

    Args:
        nodes: the name of each rank's node.
        ep: number of ranks per group.
        domains: the name of the domain (a rack, an NVLink domain) of each rank's node; by default all are in one.
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
    """Return the ranks of a group as one list per node, of equal lengths and in the group's order.

    None if there is no such layout, because the nodes have different numbers of its ranks, or because ranks of another
    node stand between those of one node.
    """
    runs = [list(ranks) for _, ranks in groupby(group, key=lambda rank: nodes[rank])]
    whole = len(runs) == len({nodes[rank] for rank in group}) and len({len(ranks) for ranks in runs}) == 1
    return runs if whole else None


def _filled(ranks: Iterable[int], places: Sequence[object], ep: int) -> tuple[list[list[int]], list[int]]:
    """Return the whole groups of `ep` ranks at one place each, and the remaining ranks, place by place."""
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
    """Return in one line what a cluster lacks to run `workers` workers; None if it can hold them.

    Args:
        nodes: all nodes of the cluster, with their total resources.
        cpus, gpus: number of CPUs and GPUs per worker.
        workers: smallest number of workers that can start.
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
    """Number of free CPUs."""
    gpus: float
    """Number of free GPUs."""
    domain: str = ""
    """Name of the domain that a faster network connects; nodes without one are all in the same domain."""

    def holds(self, cpus: int, gpus: int) -> int:
        """Return the number of workers that fit, each with `cpus` CPUs and `gpus` GPUs."""
        return int(min(self.cpus // cpus, self.gpus // gpus) if gpus else self.cpus // cpus)


def packed(nodes: Sequence[Node], cpus: int, gpus: int, workers: int) -> list[Node]:
    """Return the node of each rank; if the nodes hold fewer workers, only the nodes of those that fit.

    The packing is Ray's for a placement group of equal bundles (BundlePackSchedulingPolicy of its
    src/ray/raylet/scheduling/policy), which Ray Train requests: the node on which one worker would leave the largest
    share free comes first, and is filled before the next. Ray's order among equal nodes is arbitrary; here it is the
    order of `nodes`. Ray Train numbers ranks node by node.

    Args:
        nodes: nodes with their free resources.
        cpus: number of CPUs per worker.
        gpus: number of GPUs per worker.
        workers: total number of workers.
    """

    def left(node: Node) -> float:
        shares = [(node.cpus - cpus) / node.cpus] + ([(node.gpus - gpus) / node.gpus] if gpus else [])
        return sum(shares)

    able = [node for node in nodes if node.holds(cpus, gpus)]
    places = [node for node in sorted(able, key=left, reverse=True) for _ in range(node.holds(cpus, gpus))]
    return places[:workers]


def on_paper(nodes: int, cpus: int, gpus: int, nodes_per_domain: int | None = None) -> list[Node]:
    """Return equal hypothetical nodes, in domains of `nodes_per_domain` nodes each, or all in one."""
    domains = [f"domain{i // nodes_per_domain}" if nodes_per_domain else "" for i in range(nodes)]
    return [Node(f"node{i}", cpus, gpus, domain) for i, domain in enumerate(domains)]


class Kind(NamedTuple):
    """Properties that equivalent nodes of a group share."""

    domain: str
    ranks: int
    """Number of the group's ranks on such a node."""


Spread = Counter[Kind]
"""Number of nodes of each kind that hold a group's ranks."""


class Layout(NamedTuple):
    nodes: list[str]
    """Name of each rank's node."""
    domains: list[str]
    """Name of each rank's domain."""
    groups: Groups

    def spread(self, ranks: Sequence[int]) -> Spread:
        on = Counter((self.domains[rank], self.nodes[rank]) for rank in ranks)
        return Counter(Kind(domain, count) for (domain, _), count in on.items())

    @property
    def everyone(self) -> list[list[int]]:
        """A single group of all ranks."""
        return [list(range(len(self.nodes)))]

    @property
    def replicas(self) -> list[list[int]]:
        """Data-parallel groups: the ranks that hold the same experts."""
        return [list(ranks) for ranks in zip(*self.groups.ranks, strict=True)]

    @property
    def on_nodes(self) -> list[list[int]]:
        """Ranks of each node, one list per node."""
        of: dict[str, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            of.setdefault(node, []).append(rank)
        return list(of.values())


def laid_out(places: Sequence[Node], ep: int) -> Layout:
    """Return the layout of ranks on the given nodes, one entry per rank; the number of ranks must be a multiple of
    ep."""
    nodes, domains = [node.name for node in places], [node.domain for node in places]
    return Layout(nodes, domains, expert_groups(nodes, ep, domains))


def on_one_node(workers: int, ep: int) -> Layout:
    return laid_out([Node("node", workers, workers)] * workers, ep)
