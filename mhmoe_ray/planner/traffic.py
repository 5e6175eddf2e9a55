"""Bytes that ranks exchange in one training step, and the links that they cross.

Link classes are within a node, between nodes of a domain, and between domains.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.placement import Kind, Layout, Spread, on_one_node
from mhmoe_ray.planner.sizes import INT32, INT64, compute_bytes, sizes
from mhmoe_ray.spec import RunSpec


class Sends(NamedTuple):
    """Amount that ranks send over links of one class in one exchange, in bytes or as a fraction of what is
    exchanged."""

    mean: float = 0.0
    """Mean over ranks."""
    most: float = 0.0
    """Amount of the rank that sends most, which determines the time of the exchange."""
    messages: int = 0
    """Number of messages that one rank sends one after another."""


class Links(NamedTuple):
    """Amounts by link class; the field names are the keys of `cluster.network`."""

    node: Sends = Sends()
    domain: Sends = Sends()
    between: Sends = Sends()

    def of(self, size: float, rounds: int = 1) -> "Links":
        """Return these fractions as bytes of a payload of `size` bytes, sent in `rounds` rounds of messages."""
        return Links(*(Sends(size * s.mean, size * s.most, rounds * s.messages) for s in self))


Pattern = Callable[[Spread, Kind], Links]
"""Function that returns what a rank on a node of a kind sends in an exchange within a group of a given spread."""


def crossed(groups: Iterable[Spread], pattern: Pattern) -> Links:
    """Return what ranks send over each class of links in an exchange that all these groups do at once."""
    every = [(kind.ranks * nodes, pattern(group, kind)) for group in groups for kind, nodes in group.items()]
    ranks = sum(count for count, _ in every)

    def over(i: int) -> Sends:
        mean = sum(count * links[i].mean for count, links in every) / ranks
        return Sends(mean, max(links[i].most for _, links in every), max(links[i].messages for _, links in every))

    return Links(*(over(i) for i in range(3)))


def flat(group: Spread, kind: Kind) -> Links:
    """Return what a rank on a node of this kind sends in an all-to-all among all ranks of the group, as fractions of
    its rows."""
    ranks = sum(k.ranks * nodes for k, nodes in group.items())
    in_domain = sum(k.ranks * nodes for k, nodes in group.items() if k.domain == kind.domain)
    there = (kind.ranks - 1, in_domain - kind.ranks, ranks - in_domain)
    return Links(*(Sends(count / ranks, count / ranks, count) for count in there))


def to_nodes(reached: Callable[[int, int], float]) -> Pattern:
    """Return the pattern of sending rows to one rank of each other node of the group, as fractions of a rank's rows.

    Args:
        reached: function that returns the fraction of the rows that go to a node, from the number of the group's ranks
            on it and the number of all its ranks.
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
    """Return what a rank on a node of this kind sends in an all-to-all among the ranks of each node, as fractions of
    its rows."""
    away = (kind.ranks - 1) / kind.ranks
    return Links(Sends(away, away, kind.ranks - 1))


def ring(group: Spread, kind: Kind) -> Links:
    """Return what a rank on a node of this kind sends in a ring through all ranks of the group, as fractions of what it
    sends in all, with the messages of one round."""
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
    """Return the probability that at least one of k different experts, drawn uniformly from E, is among `held` experts.

    This is 1 minus the hypergeometric probability of none. Summed over nodes, it is the expected number of nodes that a
    row must go to.
    """
    return 1 - math.comb(experts - held, top_k) / math.comb(experts, top_k)


class Exchange(NamedTuple):
    """Collective operation as seen by one rank, on average where ranks differ."""

    name: str
    ranks: int
    """Number of ranks in the collective's group."""
    payload: int
    """Bytes of the tensor that the rank contributes to one call. For an all-to-all these are the bytes that leave the
    rank under uniform routing, without the rows that stay on it."""
    sent: int
    """Bytes that leave the rank in one call: all bytes of an all-to-all; for other collectives, those of a ring."""
    times: int
    """Number of calls per step."""
    links: Links
    """Amounts that one call sends over each class of links."""

    @property
    def sent_per_step(self) -> int:
        return self.sent * self.times


def exchanges(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """Return all exchanges of a step: rows to experts and back in each layer and micro-batch; gradients; weights, if
    ranks hold shards. On a single rank there are none.

    Args:
        spec: spec of the run.
        layout: placement of its ranks; by default all are on one node.
    """
    return [*dispatches(spec, layout), *reductions(spec, layout)]


def dispatches(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """Return the exchanges of expert parallelism, in the order of a layer's forward and backward.

    Hierarchical dispatch sends a row once to each other node on which it has an expert, to one rank there, with its k
    choices and gates; from that rank each of the row's routes goes to the rank of its expert. One row comes back, the
    sum over that node's experts. Gradients take the same ways, with those of gates. Groups with different numbers of
    ranks on their nodes stay flat, and their traffic counts as traffic by node. Under dropout each route is a row of
    its own.
    """
    cluster, model, moe = spec.cluster, spec.model, spec.model.moe
    if moe is None or cluster.ep == 1:
        return []
    layout = layout or on_one_node(cluster.world, cluster.ep)
    groups = [layout.spread(ranks) for ranks in layout.groups.ranks]
    times = model.moe_layers * _micro_batches(spec)
    tokens = spec.tokens_per_micro_batch
    routed = tokens * moe.top_k * model.d_model * compute_bytes(spec)  # k routes of h rows of width d/h
    counts = INT64 * moe.experts
    ways = ("rows to experts", "outputs back", "gradients of outputs to experts", "gradients of rows back")

    def exchange(name: str, pattern: Pattern) -> Exchange:
        links = crossed(groups, pattern)
        sent = round(sum(s.mean for s in links))
        return Exchange(name, cluster.ep, sent, sent, times, links)

    def straight(size: int) -> Pattern:
        return lambda group, kind: flat(group, kind).of(size)

    if cluster.dispatch == "flat" or not any(map(has_rails, groups)):
        return [exchange("counts per expert", straight(counts)), *(exchange(way, straight(routed)) for way in ways)]

    choices = 1 if model.dropout else moe.top_k

    def by_node(size: int, straight_size: int, top_k: int) -> Pattern:
        def part(ranks: int, of_all: int) -> float:
            return reached(moe.experts, moe.experts * ranks // of_all, top_k)

        along = to_nodes(part)
        return lambda group, kind: (
            along(group, kind).of(size) if has_rails(group) else straight(straight_size)(group, kind)
        )

    def on_nodes(pattern: Pattern) -> Pattern:
        return lambda group, kind: pattern(group, kind) if has_rails(group) else Links()

    row, route = routed // choices, tokens * moe.heads * moe.top_k
    beside = {ways[0]: route * (INT32 + FLOAT32), ways[3]: route * FLOAT32}
    found = [
        exchange("counts, by node", by_node(2 * INT64, counts, moe.experts)),  # of rows and of their routes
        exchange("counts, within nodes", on_nodes(lambda group, kind: Links(flat(group, kind).of(counts).node))),
    ]
    for way in ways:
        found.append(exchange(f"{way}, by node", by_node(row + beside.get(way, 0), routed, choices)))
        found.append(exchange(f"{way}, within nodes", on_nodes(lambda *at: within_nodes(*at).of(routed))))
    return found


def has_rails(group: Spread) -> bool:
    """Whether a group spans several nodes with the same number of ranks on each; hierarchical dispatch handles other
    groups flat."""
    return group.total() > 1 and len({kind.ranks for kind in group}) == 1


def reductions(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """Return the exchanges of data parallelism: gradients, and weights if ranks hold shards."""
    cluster, found = spec.cluster, sizes(spec.model)
    layout = layout or on_one_node(cluster.world, cluster.ep)
    shared = FLOAT32 * (found.parameters - found.expert_parameters)
    result = _made_whole(spec, cluster.strategy, "all but experts", shared, layout, layout.everyone)
    if spec.model.moe is not None:
        experts = FLOAT32 * found.expert_parameters // cluster.ep
        result += _made_whole(
            spec, cluster.strategy if cluster.slices_experts else "ddp", "experts", experts, layout, layout.replicas
        )
    return [exchange for exchange in result if exchange.ranks > 1]


def _made_whole(
    spec: RunSpec, strategy: str, what: str, size: int, layout: Layout, groups: list[list[int]]
) -> list[Exchange]:
    """Return the exchanges that reduce gradients, and gather weights if ranks hold shards, for `size` bytes of weights
    in each of these groups.

    Weights are gathered for each forward and each backward; ZeRO 1 and 2 gather them only once, after the update. ZeRO
    2 and 3 reduce gradients in each backward, because they keep no whole ones; the others reduce them in the last
    backward. Blocks and buckets count as if they were sent in one piece. ZeRO 3 may still hold up to two gathered
    blocks from the forward when the backward begins; the count does not subtract them.
    """
    ranks, micro_batches = len(groups[0]), _micro_batches(spec)
    gradients, weights = f"gradients of {what}", f"weights of {what}"
    links = crossed(map(layout.spread, groups), ring)
    away = size * (ranks - 1) // ranks
    if strategy == "ddp":
        sent = 2 * size * (ranks - 1) // ranks
        return [Exchange(gradients, ranks, size, sent, 1, links.of(sent, rounds=2))]
    gathers = 2 * micro_batches if strategy in ("fsdp", "zero3") else 1
    reductions = micro_batches if strategy in ("zero2", "zero3") else 1
    return [
        Exchange(weights, ranks, size // ranks, away, gathers, links.of(away)),
        Exchange(gradients, ranks, size, away, reductions, links.of(away)),
    ]


def _micro_batches(spec: RunSpec) -> int:
    """Return the number of micro-batches per rank and step."""
    return spec.train.micro_batches // spec.cluster.world
