"""Bytes that ranks exchange in one training step, and the links they cross.

Links are within a node, between nodes of a domain, and between domains.
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


class Exchange(NamedTuple):
    """A collective, as one rank sees it, on average where they differ."""

    name: str
    ranks: int
    """In its group."""
    payload: int
    """Bytes of the tensor that the rank brings, at a time; to an all-to-all, where its own rows stay out, as many as
    uniform routing gives it."""
    sent: int
    """Bytes that leave the rank for it: all of an all-to-all's, of the others those of a ring."""
    times: int
    """In a step."""
    links: Links
    """Where they go."""

    @property
    def sent_per_step(self) -> int:
        return self.sent * self.times


def exchanges(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """All of a step: rows to experts and back in each layer and micro-batch; gradients; weights, where ranks hold
    slices. None on a single rank.

    Args:
        spec: of the run.
        layout: where its ranks are; by default all are on one node.
    """
    return [*dispatches(spec, layout), *reductions(spec, layout)]


def dispatches(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """The part of expert parallelism, in the order of a layer's forward and backward.

    Hierarchical dispatch sends a row once to each other node on which it has an expert, to one rank there, with its k
    choices and gates; from there each of its routes goes to its expert's rank. Back comes one row, the sum over that
    node's experts; then the same of gradients, with those of gates. Groups with unequally many ranks on their nodes
    stay flat: theirs count to what goes by node. Under dropout each route is a row of its own.
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
    """Whether it lies on several nodes, with as many ranks on each: hierarchical dispatch of others is flat."""
    return group.total() > 1 and len({kind.ranks for kind in group}) == 1


def reductions(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """The part of data parallelism."""
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
    """Of so many bytes of weights in each of these groups: gradients, and weights where ranks hold slices.

    Those are put together for each forward and each backward, or by ZeRO 1 and 2 once, after the update. ZeRO 2 and 3
    reduce gradients in each backward, as they keep no whole ones; the others in the last. Blocks and buckets of them
    are counted as if they went in one piece. What ZeRO 3 still has of a forward when its backward begins, two blocks at
    most, is not taken off.
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
    """Of each rank in a step."""
    return spec.train.micro_batches // spec.cluster.world
