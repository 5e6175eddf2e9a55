"""Over which links ranks send what they exchange: within a node, between nodes of a domain, between domains.

Routing is taken as uniform: k of E experts, each set of k as likely as any other.

A ring (all-reduce, all-gather, reduce-scatter) goes through a group domain by domain and node by node, once for each of
its ranks on a node, each time out of the node by another of them, as NCCL lays it out where every rank has a network
port of its own. So of n ranks on a node each sends 1/n of its bytes out of it, the node with the fewest ranks sets the
pace, and the hop between two domains is as much as any other. It takes as many steps as there are other ranks, one of
them for each further node or domain over the slower link (NCCL's own reckoning, src/graph/tuning.cc). No tree: those
spare steps, not bytes.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

from mhmoe_ray.placement.layout import Kind, Spread


class Sends(NamedTuple):
    """Over links of one class, in one exchange, in bytes or in parts of what is exchanged."""

    mean: float = 0.0
    """On average over ranks."""
    most: float = 0.0
    """Of the rank that sends most: the exchange takes as long as it does."""
    messages: int = 0
    """One after another."""


class Links(NamedTuple):
    """Their names are those of `cluster.network`."""

    node: Sends = Sends()
    domain: Sends = Sends()
    between: Sends = Sends()

    def of(self, size: float, rounds: int = 1) -> "Links":
        """In bytes, of parts: of so many bytes, which go in so many rounds of messages."""
        return Links(*(Sends(size * s.mean, size * s.most, rounds * s.messages) for s in self))


Pattern = Callable[[Spread, Kind], Links]
"""What a rank on a node of this kind sends in an exchange within a group so spread."""


def crossed(groups: Iterable[Spread], pattern: Pattern) -> Links:
    """Of an exchange that all these groups do at once."""
    every = [(kind.ranks * nodes, pattern(group, kind)) for group in groups for kind, nodes in group.items()]
    ranks = sum(count for count, _ in every)

    def over(i: int) -> Sends:
        mean = sum(count * links[i].mean for count, links in every) / ranks
        return Sends(mean, max(links[i].most for _, links in every), max(links[i].messages for _, links in every))

    return Links(*(over(i) for i in range(3)))


def flat(group: Spread, kind: Kind) -> Links:
    """An all-to-all of rows among all ranks of the group, in parts of a rank's rows."""
    ranks = sum(k.ranks * nodes for k, nodes in group.items())
    in_domain = sum(k.ranks * nodes for k, nodes in group.items() if k.domain == kind.domain)
    there = (kind.ranks - 1, in_domain - kind.ranks, ranks - in_domain)
    return Links(*(Sends(count / ranks, count / ranks, count) for count in there))


def to_nodes(reached: Callable[[int, int], float]) -> Pattern:
    """To one rank of each other node of the group, in parts of a rank's rows.

    Args:
        reached: which part of them goes to a node, by how many of how many ranks it has.
    """

    def pattern(group: Spread, kind: Kind) -> Links:
        ranks = sum(k.ranks * nodes for k, nodes in group.items())
        others = group - Spread([kind])
        part, messages = [0.0, 0.0], [0, 0]
        for other, nodes in others.items():
            apart = other.domain != kind.domain
            part[apart] += nodes * reached(other.ranks, ranks)
            messages[apart] += nodes
        return Links(Sends(), *(Sends(p, p, m) for p, m in zip(part, messages, strict=True)))

    return pattern


def within_nodes(_: Spread, kind: Kind) -> Links:
    """An all-to-all among the ranks of each node, in parts of a rank's rows."""
    away = (kind.ranks - 1) / kind.ranks
    return Links(Sends(away, away, kind.ranks - 1))


def ring(group: Spread, kind: Kind) -> Links:
    """In parts of what a rank sends, with the messages of one round through all ranks."""
    ranks = sum(k.ranks * nodes for k, nodes in group.items())
    nodes, domains = group.total(), len({k.domain for k in group})
    out = 1 / kind.ranks if nodes > 1 else 0.0
    apart = domains / nodes if domains > 1 else 0.0  # of the ways out of nodes, those into another domain
    return Links(
        Sends(1 - out, 1 - out, ranks - nodes),
        Sends(out * (1 - apart), out if nodes > domains else 0.0, nodes - domains),
        Sends(out * apart, out if domains > 1 else 0.0, domains - 1),
    )


@cache
def reached(experts: int, held: int, top_k: int) -> float:
    """The probability that at least one of k different experts, drawn uniformly from E, is among so many: 1 less that
    of none, which is hypergeometric. Summed over nodes, the expected number of them that a row must go to."""
    return 1 - math.comb(experts - held, top_k) / math.comb(experts, top_k)
