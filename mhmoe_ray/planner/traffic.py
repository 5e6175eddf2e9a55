"""Bytes that ranks exchange in one training step, and over which links."""

from typing import NamedTuple

from mhmoe_ray.placement.layout import Layout, on_one_node
from mhmoe_ray.planner.links import Links, Pattern, crossed, flat, reached, ring, to_nodes, within_nodes
from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.planner.units import FLOAT32, INT64, compute_bytes
from mhmoe_ray.spec import RunSpec


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
    node's experts; then the same of gradients, with those of gates.
    """
    cluster, model, moe = spec.cluster, spec.model, spec.model.moe
    if moe is None or cluster.ep == 1:
        return []
    layout = layout or on_one_node(cluster.dp * cluster.ep, cluster.ep)
    groups = [layout.spread(ranks) for ranks in layout.groups.ranks]
    times = model.moe_layers * _micro_batches(spec)
    tokens = spec.train.micro_batch_size * spec.data.seq_len
    row = model.d_model * compute_bytes(spec)  # h rows of width d/h
    ways = ("rows to experts", "outputs back", "gradients of outputs to experts", "gradients of rows back")

    def exchange(name: str, size: int, pattern: Pattern) -> Exchange:
        links = crossed(groups, pattern).of(size)
        sent = round(sum(s.mean for s in links))
        return Exchange(name, cluster.ep, sent, sent, times, links)

    if cluster.dispatch == "flat" or all(group.total() == 1 for group in groups):
        counts = exchange("counts per expert", INT64 * moe.experts, flat)
        return [counts, *(exchange(way, tokens * moe.top_k * row, flat) for way in ways)]

    def with_experts(ranks: int, of_all: int) -> float:
        return reached(moe.experts, moe.experts * ranks // of_all, moe.top_k)

    rows, choices = tokens * row, tokens * moe.heads * moe.top_k * (INT64 + FLOAT32)
    gates = tokens * moe.heads * moe.top_k * FLOAT32
    beside = {ways[0]: choices, ways[3]: gates}
    found = [exchange("counts per node, by node", INT64, to_nodes(lambda ranks, of_all: 1.0))]
    found.append(exchange("counts per expert, within nodes", INT64 * moe.experts, lambda *of: Links(flat(*of).node)))
    for way in ways:
        found.append(exchange(f"{way}, by node", rows + beside.get(way, 0), to_nodes(with_experts)))
        found.append(exchange(f"{way}, within nodes", rows * moe.top_k, within_nodes))
    return found


def reductions(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """The part of data parallelism."""
    cluster, found = spec.cluster, sizes(spec.model)
    layout = layout or on_one_node(cluster.dp * cluster.ep, cluster.ep)
    shared = FLOAT32 * (found.parameters - found.expert_parameters)
    result = _made_whole(spec, cluster.strategy, "all but experts", shared, layout, layout.everyone)
    if spec.model.moe is not None:
        slices = cluster.strategy != "fsdp" or cluster.shard_experts
        experts = FLOAT32 * found.expert_parameters // cluster.ep
        result += _made_whole(spec, cluster.strategy if slices else "ddp", "experts", experts, layout, layout.replicas)
    return [exchange for exchange in result if exchange.ranks > 1]


def _made_whole(
    spec: RunSpec, strategy: str, what: str, size: int, layout: Layout, groups: list[list[int]]
) -> list[Exchange]:
    """Of so many bytes of weights in each of these groups: gradients, and weights where ranks hold slices.

    Those are put together for each forward and each backward, or by ZeRO 1 and 2 once, after the update. ZeRO 2 and 3
    reduce gradients in each backward, as they keep no whole ones; the others in the last. Blocks and buckets of them
    are counted as if they went in one piece.
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
    return spec.train.micro_batches // (spec.cluster.dp * spec.cluster.ep)
