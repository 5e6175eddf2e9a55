"""Expert-parallel groups of ranks, and the nodes on which ranks are placed, by plan or by Ray, without torch or Ray."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, TypeVar

from mhmoe_ray.spec import ClusterSpec


class ExpertGroups(NamedTuple):
    """Division of all ranks into expert-parallel groups."""

    ranks: list[list[int]]
    """Ranks of each group, ascending and equally many. The rank at position j holds the j-th share of the experts."""
    straddling_indices: list[int]
    """Indices of the groups whose ranks are on more than one node."""
    cross_domain_indices: list[int]
    """Indices of the groups whose ranks are in more than one domain."""

    @property
    def refusal_reason(self) -> str | None:
        """The reason to refuse these groups if `cluster.straddling` is refuse; None if each group is on one node."""
        if not self.straddling_indices:
            return None
        fraction = f"{len(self.straddling_indices)} of {len(self.ranks)}"
        return f"{fraction} expert-parallel groups would lie on more than one node"


def expert_groups(nodes: Sequence[str], ep: int, domains: Sequence[str] | None = None) -> ExpertGroups:
    """Divide ranks into expert-parallel groups of `ep`: first within nodes, then within domains, then anywhere.

    The number of ranks must be a multiple of `ep`. Nodes and domains, such as racks or NVLink domains, are in the order
    of their first rank. By default there is one domain.
    """
    assert len(nodes) % ep == 0
    domains = domains or [""] * len(nodes)
    groups: list[list[int]] = []
    remaining_ranks = list(range(len(nodes)))
    # Groups are formed within nodes first, then within domains, then anywhere: links within a node are the fastest, and
    # those within a domain are faster than those between domains.
    for locations in (list(zip(domains, nodes, strict=True)), list(domains), [""] * len(nodes)):
        full_groups, remaining_ranks = _fill_groups(remaining_ranks, locations, ep)
        # The ranks of a group are sorted, because torch numbers the ranks of a process group in ascending order,
        # whatever order it gets.
        groups += map(sorted, full_groups)
    return ExpertGroups(groups, _spanning_groups(groups, nodes), _spanning_groups(groups, domains))


def sharding_groups(expert_groups: Sequence[Sequence[int]], size: int) -> list[list[list[int]]]:
    """Return the groups of `size` ranks over which fsdp shards tensors, each as a list of rows of ranks.

    The ranks of a row hold different experts, and together all of them. The ranks of a column hold the same experts.
    Expert groups of the same node must follow each other, so that a group of the result stays on a node if it can.
    """
    count = size // len(expert_groups[0])
    groups = [[list(ranks) for ranks in expert_groups[i : i + count]] for i in range(0, len(expert_groups), count)]
    # torch numbers the ranks of a process group in ascending order, so the ranks that hold the same experts ascend.
    return [[list(row) for row in zip(*(sorted(c) for c in zip(*g, strict=True)), strict=True)] for g in groups]


def ranks_by_node(group: Sequence[int], nodes: Sequence[str]) -> list[list[int]] | None:
    """Return the ranks of a group as one list per node, in the group's order.

    The result is None if the lists are not equally long, or if a node's ranks are not consecutive in the group.
    """
    runs = [list(ranks) for _, ranks in groupby(group, key=lambda rank: nodes[rank])]
    is_even = len(runs) == len({nodes[rank] for rank in group}) and len({len(ranks) for ranks in runs}) == 1
    return runs if is_even else None


def _fill_groups(ranks: Iterable[int], locations: Sequence[object], ep: int) -> tuple[list[list[int]], list[int]]:
    """Form as many groups of `ep` ranks at a location as possible; return them and the remaining ranks by location."""
    ranks_by_location: dict[object, list[int]] = {}
    for rank in ranks:
        ranks_by_location.setdefault(locations[rank], []).append(rank)
    groups: list[list[int]] = []
    remaining_ranks: list[int] = []
    for local_ranks in ranks_by_location.values():
        grouped_ranks = len(local_ranks) // ep * ep
        groups += [local_ranks[i : i + ep] for i in range(0, grouped_ranks, ep)]
        remaining_ranks += local_ranks[grouped_ranks:]
    return groups, remaining_ranks


def _spanning_groups(groups: list[list[int]], locations: Sequence[str]) -> list[int]:
    return [i for i, group in enumerate(groups) if len({locations[rank] for rank in group}) > 1]


def capacity_shortfall(nodes: "Sequence[Node]", cpus: int, gpus: int, workers: int) -> str | None:
    """Return a message of one line if a cluster's total resources are too few for `workers` workers, else None."""
    fitting_workers = len(pack_workers(nodes, cpus, gpus, workers))
    if fitting_workers >= workers:
        return None
    bundle = f"{cpus} CPU{'s' if cpus > 1 else ''}" + (f" and {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "")
    request = f"{workers} workers with {bundle} each" if workers > 1 else f"a worker with {bundle}"
    if gpus and not any(node.gpus for node in nodes):
        return f"it needs {request}, and the cluster has no GPU"
    cluster_total = " and ".join(
        f"{sum(getattr(node, resource) for node in nodes):g} {label}s"
        for resource, label in (("cpus", "CPU"), ("gpus", "GPU"))
    )
    return (
        f"it needs {request}, and the cluster's {len(nodes)} nodes with {cluster_total} in all hold {fitting_workers}"
    )


class Node(NamedTuple):
    """Node of a cluster, with its numbers of CPUs and GPUs: either those that are free now, or all that it has."""

    name: str
    cpus: float
    gpus: float
    domain: str = ""
    """Name of the set of nodes that a faster network connects; nodes without a name form one domain."""

    def worker_capacity(self, cpus: int, gpus: int) -> int:
        """Return the number of workers with `cpus` CPUs and `gpus` GPUs each that the node can hold."""
        return int(min(self.cpus // cpus, self.gpus // gpus) if gpus else self.cpus // cpus)


def pack_workers(nodes: Sequence[Node], cpus: int, gpus: int, workers: int) -> list[Node]:
    """Return the node on which Ray would place each rank; the list is shorter if the nodes cannot hold all workers.

    `nodes` have their free resources, of which each worker takes `cpus` CPUs and `gpus` GPUs. Ray's order among equal
    nodes is arbitrary; here it is that of `nodes`.
    """

    # Ray Train requests a placement group of equal bundles. Ray's BundlePackSchedulingPolicy
    # (src/ray/raylet/scheduling/policy) fills one node after the other, beginning with the node that would have the
    # largest free share after one worker. Ray Train numbers ranks node by node.
    def free_share(node: Node) -> float:
        shares = [(node.cpus - cpus) / node.cpus] + ([(node.gpus - gpus) / node.gpus] if gpus else [])
        return sum(shares)

    usable_nodes = [node for node in nodes if node.worker_capacity(cpus, gpus)]
    slots = [
        node
        for node in sorted(usable_nodes, key=free_share, reverse=True)
        for _ in range(node.worker_capacity(cpus, gpus))
    ]
    return slots[:workers]


def plan_workers(nodes: Sequence[Node], cpus: int, gpus: int, workers: int, ep: int) -> list[Node]:
    """Return a node for each rank so that as few expert-parallel groups as possible span nodes, and of these as few as
    possible domains; among such plans, few domains and nodes are used.

    Arguments are those of `pack_workers`. The names of nodes must differ, and `workers` must be a multiple of `ep`.
    """
    free_slots = {node: node.worker_capacity(cpus, gpus) for node in nodes}
    if sum(free_slots.values()) < workers:
        return pack_workers(nodes, cpus, gpus, workers)
    rank_counts: Counter[Node] = Counter()
    remaining_groups = workers // ep
    # Whole groups on nodes come first. Then groups are made of the slots that are left in a domain, and then of any.
    for location_of, unit in ((attrgetter("domain"), ep), (attrgetter("domain"), 1), (lambda _: None, 1)):
        slots_by_location: dict[str | None, dict[Node, int]] = {}
        for node, slots in free_slots.items():
            slots_by_location.setdefault(location_of(node), {})[node] = slots // unit * unit
        group_slots = {location: sum(slots.values()) // ep for location, slots in slots_by_location.items()}
        for location, groups in _fill_locations(group_slots, remaining_groups).items():
            remaining_groups -= groups
            for node, ranks in _fill_locations(slots_by_location[location], groups * ep).items():
                rank_counts[node] += ranks
                free_slots[node] -= ranks
    domains = list(dict.fromkeys(node.domain for node in rank_counts))
    nodes_by_domain = sorted(rank_counts, key=lambda node: domains.index(node.domain))
    return [node for node in nodes_by_domain for _ in range(rank_counts[node])]


_Location = TypeVar("_Location")


def _fill_locations(slots: Mapping[_Location, int], count: int) -> dict[_Location, int]:
    """Return how many of `count` slots to take at each location so that few are used: the largest are filled, and the
    rest is taken at the smallest that has it. Locations of which nothing is taken are left out."""
    locations = sorted((location for location in slots if slots[location]), key=lambda location: -slots[location])
    taken_slots: dict[_Location, int] = {}
    for i, location in enumerate(locations):
        if slots[location] >= count:
            large_locations = [location for location in locations[i:] if slots[location] >= count]
            if count:
                taken_slots[large_locations[-1]] = count
            break
        taken_slots[location] = slots[location]
        count -= slots[location]
    return taken_slots


def place_workers(nodes: Sequence[Node], cluster: ClusterSpec, workers: int) -> list[Node]:
    """Return the node of each rank of a run with these resources, by its `cluster.placement`; the list is shorter if
    the nodes cannot hold all workers."""
    if cluster.placement == "pack":
        return pack_workers(nodes, cluster.cpus_per_worker, cluster.gpus_per_worker, workers)
    return plan_workers(nodes, cluster.cpus_per_worker, cluster.gpus_per_worker, workers, cluster.ep)


def nodes_on_paper(cluster: ClusterSpec, nodes: int, gpus: int) -> list[Node]:
    """Return equal nodes with CPUs for a worker on each GPU, in the domains of `cluster.network`."""
    return hypothetical_nodes(nodes, gpus * cluster.cpus_per_worker, gpus, cluster.network.nodes_per_domain)


def hypothetical_nodes(nodes: int, cpus: int, gpus: int, nodes_per_domain: int | None = None) -> list[Node]:
    """Return equal nodes of a cluster that need not exist; without `nodes_per_domain` they are in one domain."""
    domains = [f"domain{i // nodes_per_domain}" if nodes_per_domain else "" for i in range(nodes)]
    return [Node(f"node{i}", cpus, gpus, domain) for i, domain in enumerate(domains)]


class NodeKind(NamedTuple):
    """Kind of a node, from the view of a group of ranks: its domain, and how many ranks of the group it holds.

    In an exchange within the group, all nodes of one kind have the same traffic.
    """

    domain: str
    ranks: int


Spread = Counter[NodeKind]
"""Spread of a group of ranks over nodes: the number of nodes of each kind that hold its ranks."""


class Layout(NamedTuple):
    """Placement of all ranks on nodes and in domains, by rank, and their expert-parallel groups."""

    nodes: list[str]
    domains: list[str]
    groups: ExpertGroups

    def spread(self, ranks: Sequence[int]) -> Spread:
        """Return the spread of a group of ranks over nodes."""
        ranks_per_node = Counter((self.domains[rank], self.nodes[rank]) for rank in ranks)
        return Counter(NodeKind(domain, count) for (domain, _), count in ranks_per_node.items())

    @property
    def data_parallel_groups(self) -> list[list[int]]:
        """The data-parallel groups, each with the ranks that hold the same experts."""
        return [list(ranks) for ranks in zip(*self.groups.ranks, strict=True)]

    @property
    def node_groups(self) -> list[list[int]]:
        ranks_by_name: dict[str, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            ranks_by_name.setdefault(node, []).append(rank)
        return list(ranks_by_name.values())


def build_layout(rank_nodes: Sequence[Node], ep: int) -> Layout:
    """Return the layout of ranks on their nodes. The number of ranks must be a multiple of `ep`."""
    nodes, domains = [node.name for node in rank_nodes], [node.domain for node in rank_nodes]
    return Layout(nodes, domains, expert_groups(nodes, ep, domains))


def single_node_layout(workers: int, ep: int) -> Layout:
    """Return the layout of `workers` ranks on one node."""
    return build_layout([Node("node", workers, workers)] * workers, ep)
