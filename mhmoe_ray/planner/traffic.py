"""Bytes that ranks exchange in a training step, by link class: within a node, within a domain, between domains."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

from mhmoe_kernels.choice import TRITON_KERNELS
from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.family import EXPERTS, INT32, INT64, bytes_of
from mhmoe_ray.planner.kernels import assumed_kernel
from mhmoe_ray.planner.placement import Layout, NodeKind, Spread, sharding_groups, single_node_layout
from mhmoe_ray.planner.sizes import (
    adapter_sizes,
    block_sizes,
    bytes_per_value,
    compute_sizes,
    float32_sizes,
    gathered_bytes,
    trained_sizes,
)
from mhmoe_ray.spec import RunSpec

DDP_BUCKET_BYTES = 25 << 20
"""Bytes of gradients that torch's DDP reduces at a time; its first bucket is smaller."""


class LinkLoad(NamedTuple):
    """Amount that a rank sends over links of one class in one exchange, in bytes or as a fraction of the payload."""

    mean: float = 0.0
    maximum: float = 0.0
    """Amount of the rank that sends the most, which determines the time of the exchange."""
    messages: int = 0
    """Number of messages that one rank sends one after another."""

    def as_json(self) -> dict[str, float]:
        """Return the fields as `mhmoe plan --json` prints them, where the key of `maximum` is `most`."""
        return {"mean": self.mean, "most": self.maximum, "messages": self.messages}


class LinkLoads(NamedTuple):
    """Amounts that ranks send in one exchange, by link class. The field names are the keys of `cluster.network`."""

    node: LinkLoad = LinkLoad()
    domain: LinkLoad = LinkLoad()
    between: LinkLoad = LinkLoad()

    def scaled(self, size: float, rounds: int = 1) -> "LinkLoads":
        """Return these fractions of a payload in bytes, for `size` bytes that are sent in `rounds` rounds."""
        return LinkLoads(*(LinkLoad(size * load.mean, size * load.maximum, rounds * load.messages) for load in self))


Pattern = Callable[[Spread, NodeKind], LinkLoads]
"""Loads that a rank sends in an exchange, as a function of its group's spread and the kind of its node."""


def group_loads(groups: Iterable[Spread], pattern: Pattern) -> LinkLoads:
    """Return the loads of an exchange within each group of ranks, as mean and maximum over the ranks of all groups."""
    # On a large cluster, most groups have the same spread.
    group_counts = Counter(frozenset(group.items()) for group in groups)
    kind_loads = [
        (count * kind.ranks * nodes, pattern(Counter(dict(group)), kind))
        for group, count in group_counts.items()
        for kind, nodes in group
    ]
    ranks = sum(count for count, _ in kind_loads)

    def class_load(i: int) -> LinkLoad:
        mean = sum(count * links[i].mean for count, links in kind_loads) / ranks
        return LinkLoad(
            mean, max(links[i].maximum for _, links in kind_loads), max(links[i].messages for _, links in kind_loads)
        )

    return LinkLoads(*(class_load(i) for i in range(3)))


def all_to_all_pattern(group: Spread, kind: NodeKind) -> LinkLoads:
    """Return the loads of a rank in an all-to-all with equally many rows for each rank, as fractions of its rows."""
    ranks = sum(other_kind.ranks * nodes for other_kind, nodes in group.items())
    in_domain = sum(other_kind.ranks * nodes for other_kind, nodes in group.items() if other_kind.domain == kind.domain)
    message_counts = (kind.ranks - 1, in_domain - kind.ranks, ranks - in_domain)
    return LinkLoads(*(LinkLoad(count / ranks, count / ranks, count) for count in message_counts))


def to_nodes_pattern(node_share: Callable[[int, int], float]) -> Pattern:
    """Return the pattern of an exchange in which a rank sends rows to one rank of each other node.

    `node_share(ranks, all_ranks)` is the fraction of its rows that goes to a node with `ranks` of the group's
    `all_ranks` ranks. The loads are fractions of its rows, too.
    """

    def pattern(group: Spread, kind: NodeKind) -> LinkLoads:
        ranks = sum(k.ranks * nodes for k, nodes in group.items())
        other_kinds = group - Spread([kind])
        shares, messages = [0.0, 0.0], [0, 0]
        for other_kind, nodes in other_kinds.items():
            is_other_domain = other_kind.domain != kind.domain
            shares[is_other_domain] += nodes * node_share(other_kind.ranks, ranks)
            messages[is_other_domain] += nodes
        return LinkLoads(LinkLoad(), *(LinkLoad(p, p, m) for p, m in zip(shares, messages, strict=True)))

    return pattern


def within_nodes_pattern(_: Spread, kind: NodeKind) -> LinkLoads:
    """Return the loads that a rank sends in an all-to-all among the ranks of its node, as fractions of its rows."""
    remote_share = (kind.ranks - 1) / kind.ranks
    return LinkLoads(LinkLoad(remote_share, remote_share, kind.ranks - 1))


def ring_pattern(group: Spread, kind: NodeKind) -> LinkLoads:
    """Return the loads that a rank sends in one round of a ring through its group, as fractions of all its bytes.

    All ranks of a node have an equal share of the bytes that leave it. `mean` and `maximum` differ, because only one
    node of each domain sends to another domain.
    """
    # The ring goes through all ranks of a node, then through all nodes of a domain. So one rank of each node, the
    # node's exit, sends to another node.
    ranks = sum(other_kind.ranks * nodes for other_kind, nodes in group.items())
    nodes, domains = group.total(), len({other_kind.domain for other_kind in group})
    node_exit_share = 1 / kind.ranks if nodes > 1 else 0.0
    # Of the ranks that send to another node, one per node, one per domain sends to another domain.
    domain_exit_share = domains / nodes if domains > 1 else 0.0
    return LinkLoads(
        LinkLoad(1 - node_exit_share, 1 - node_exit_share, ranks - nodes),
        LinkLoad(
            node_exit_share * (1 - domain_exit_share), node_exit_share if nodes > domains else 0.0, nodes - domains
        ),
        LinkLoad(node_exit_share * domain_exit_share, node_exit_share if domains > 1 else 0.0, domains - 1),
    )


@cache
def hit_probability(experts: int, local_experts: int, top_k: int) -> float:
    """Return the probability that a row needs a node, which holds `local_experts` of all `experts` experts.

    The row has `top_k` different experts, drawn uniformly. Summed over nodes, the probability is the expected number of
    nodes to which a row is sent.
    """
    # This is 1 minus the hypergeometric probability that the row has none of the node's experts.
    return 1 - math.comb(experts - local_experts, top_k) / math.comb(experts, top_k)


class Exchange(NamedTuple):
    """Collective operation that recurs in each training step, with the bytes of one rank (a mean if ranks differ)."""

    name: str
    ranks: int
    payload: int
    """Bytes that the rank contributes to one call; for an all-to-all, those that it sends under uniform routing."""
    sent_bytes: int
    """Bytes that the rank sends in one call; collectives other than an all-to-all count as rings."""
    times: int
    """Number of calls per step."""
    links: LinkLoads
    """Bytes that ranks send in one call over each class of links."""

    @property
    def sent_per_step(self) -> int:
        return self.sent_bytes * self.times

    def as_json(self) -> dict[str, Any]:
        """Return the fields and `sent_per_step` as `mhmoe plan --json` prints them, with `sent` for `sent_bytes`."""
        fields = self._asdict()
        links = {name: load.as_json() for name, load in self.links._asdict().items()}
        return {"sent": fields.pop("sent_bytes"), **fields, "sent_per_step": self.sent_per_step, "links": links}


def all_exchanges(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """Return all exchanges of a training step; without a layout, all ranks are on one node."""
    return [*dispatch_exchanges(spec, layout), *reduction_exchanges(spec, layout)]


def dispatch_exchanges(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """Return the exchanges of expert parallelism, in the order of a layer's forward and backward.

    Hierarchical dispatch sends a row, with its k choices and gates, once to each other node with an expert for it.
    There, the row is sent to the rank of each of its experts, and the sum of their outputs is sent back. Gradients take
    the same paths. A group with different numbers of ranks on its nodes has a flat dispatch. If other groups have a
    hierarchical one, its loads are in the exchanges whose names end in "by node".
    """
    cluster, model, moe = spec.cluster, spec.model, spec.model.moe
    if moe is None or cluster.ep == 1:
        return []
    layout = layout or single_node_layout(cluster.max_world_size, cluster.ep)
    groups = [layout.spread(ranks) for ranks in layout.groups.ranks]
    passes = model.moe_layers * _micro_batches(spec)
    # A recomputed block repeats the exchanges of its forward, but not those of counts.
    forward_passes = 2 * passes if spec.train.recompute == "block" else passes
    tokens = spec.tokens_per_micro_batch
    # A token has h rows, and each row has k routes. At the default width d/h, the routes of a token have k * d values
    # whatever h is.
    route_bytes = tokens * moe.top_k * model.joined_width * bytes_per_value(spec)
    count_bytes = INT64 * moe.experts
    stages = ("rows to experts", "outputs back", "gradients of outputs to experts", "gradients of rows back")
    route_count = tokens * moe.heads * moe.top_k
    # Triton's kernels scale outputs on the expert's rank. So a gate travels with each row, and its gradient back.
    gate_bytes = FLOAT32 * route_count if assumed_kernel(spec) in TRITON_KERNELS else 0
    flat_bytes = {s: route_bytes + gate_bytes * (s in ("rows to experts", "gradients of rows back")) for s in stages}

    def build_exchange(name: str, pattern: Pattern) -> Exchange:
        links = group_loads(groups, pattern)
        sent_bytes = round(sum(s.mean for s in links))
        times = passes if name.startswith(("counts", "gradients")) else forward_passes
        return Exchange(name, cluster.ep, sent_bytes, sent_bytes, times, links)

    def sized_pattern(size: int) -> Pattern:
        return lambda group, kind: all_to_all_pattern(group, kind).scaled(size)

    if cluster.dispatch == "flat" or not any(map(has_rails, groups)):
        return [
            build_exchange("counts per expert", sized_pattern(count_bytes)),
            *(build_exchange(stage, sized_pattern(flat_bytes[stage])) for stage in stages),
        ]

    # With dropout each route is sent as a row of its own. Otherwise one row is sent to a node for all its routes there.
    routes_per_row = 1 if model.dropout else moe.top_k

    # A group without rails (equal numbers of ranks on several nodes) has a flat dispatch, in which its ranks send
    # `flat_size` bytes.
    def rail_pattern(size: int, flat_size: int, top_k: int) -> Pattern:
        def node_share(ranks: int, all_ranks: int) -> float:
            return hit_probability(moe.experts, moe.experts * ranks // all_ranks, top_k)

        to_other_nodes = to_nodes_pattern(node_share)
        return lambda group, kind: (
            to_other_nodes(group, kind).scaled(size) if has_rails(group) else sized_pattern(flat_size)(group, kind)
        )

    def rails_only(pattern: Pattern) -> Pattern:
        return lambda group, kind: pattern(group, kind) if has_rails(group) else LinkLoads()

    row_bytes = route_bytes // routes_per_row
    extra_bytes = {stages[0]: route_count * (INT32 + FLOAT32), stages[3]: route_count * FLOAT32}
    result = [
        # Each node gets two counts: of rows, and of their routes. Nodes without rows get them, too. So `top_k` is set
        # to the number of all experts, because then every row goes to every node.
        build_exchange("counts, by node", rail_pattern(2 * INT64, count_bytes, moe.experts)),
        build_exchange(
            "counts, within nodes",
            rails_only(lambda group, kind: LinkLoads(all_to_all_pattern(group, kind).scaled(count_bytes).node)),
        ),
    ]
    for stage in stages:
        result.append(
            build_exchange(
                f"{stage}, by node",
                rail_pattern(row_bytes + extra_bytes.get(stage, 0), flat_bytes[stage], routes_per_row),
            )
        )
        result.append(
            build_exchange(
                f"{stage}, within nodes",
                rails_only(lambda *arguments, size=flat_bytes[stage]: within_nodes_pattern(*arguments).scaled(size)),
            )
        )
    return result


def has_rails(group: Spread) -> bool:
    """Return whether a group has the same number of ranks on each of several nodes, as hierarchical dispatch needs.

    Its rails are the ranks at the same position on each node.
    """
    return group.total() > 1 and len({kind.ranks for kind in group}) == 1


def reduction_exchanges(spec: RunSpec, layout: Layout | None = None) -> list[Exchange]:
    """Return the exchanges of data parallelism among several ranks: of gradients, and of weights in shards."""
    cluster, counts = spec.cluster, compute_sizes(spec.model)
    layout = layout or single_node_layout(cluster.max_world_size, cluster.ep)
    float32_counts = float32_sizes(spec.model)
    dense_layers = spec.model.layers - spec.model.moe_layers
    float32_parameters = float32_counts.outside + dense_layers * float32_counts.dense
    float32_parameters += spec.model.moe_layers * float32_counts.mixture
    trained, adapter = trained_sizes(spec), adapter_sizes(spec)
    shared = counts.parameters - counts.expert_parameters + adapter.parameters - adapter.expert_parameters
    trained_shared = trained.parameters - trained.expert_parameters
    rank_RSE = sharding_groups(layout.groups.ranks, cluster.shard_ranks)
    shard_groups = [sorted(itertools.chain(*group)) for group in rank_RSE]
    outside = gathered_bytes(spec, block_sizes(spec.model).outside, float32_counts.outside)
    result = _collective_exchanges(
        spec,
        cluster.strategy,
        "all but experts",
        shared,
        trained_shared,
        float32_parameters,
        layout,
        shard_groups,
        outside,
    )
    if spec.model.moe is not None:
        is_sharded = cluster.shards_experts and (cluster.strategy != "fsdp" or cluster.expert_shard_ranks > 1)
        groups = [list(ranks) for group in rank_RSE for ranks in zip(*group, strict=True)]
        result += _collective_exchanges(
            spec,
            cluster.strategy if is_sharded else "ddp",
            EXPERTS,
            (counts.expert_parameters + adapter.expert_parameters) // cluster.ep,
            trained.expert_parameters // cluster.ep,
            0,
            layout,
            groups if is_sharded else layout.data_parallel_groups,
        )
    return [exchange for exchange in result if exchange.ranks > 1]


def _message_count(spec: RunSpec, strategy: str, label: str, trained_bytes: int) -> int:
    """Return the number of collective operations into which a strategy divides an exchange of all blocks."""
    model = spec.model
    if label == EXPERTS:
        tensors = sum(".experts." in name for name, _ in model.architecture.tensor_names)
        if spec.train.adapter:
            tensors = 2 * model.architecture.expert_matrices
        # Gradients of experts that are not sharded are reduced tensor by tensor.
        return model.moe_layers * (tensors if strategy == "ddp" else 1)
    return {"ddp": 1 + trained_bytes // DDP_BUCKET_BYTES, "fsdp": model.layers}.get(strategy, 1)


def _collective_exchanges(
    spec: RunSpec,
    strategy: str,
    label: str,
    parameters: int,
    trained_parameters: int,
    float32_parameters: int,
    layout: Layout,
    groups: list[list[int]],
    outside: int = 0,
) -> list[Exchange]:
    """Return the exchanges by which groups of ranks reduce gradients, and gather weights if ranks hold shards.

    `outside` are the bytes of gathered weights outside blocks, which fsdp keeps from a forward to its backward.

    An exchange is all weights or gradients of a pass, although strategies send them by block or bucket, which counts in
    the messages. The up to two gathered blocks that ZeRO 3 may still have when the backward begins are not subtracted.
    """
    ranks, micro_batches = len(groups[0]), _micro_batches(spec)
    gradients, weights = f"gradients of {label}", f"weights of {label}"
    links = group_loads(map(layout.spread, groups), ring_pattern)
    size = FLOAT32 * trained_parameters
    messages = _message_count(spec, strategy, label, size)
    if strategy == "ddp":
        sent_bytes = 2 * size * (ranks - 1) // ranks
        return [Exchange(gradients, ranks, size, sent_bytes, 1, links.scaled(sent_bytes, 2 * messages))]
    # fsdp and zero3 gather weights for each forward and each backward. zero1 and zero2 gather them only once, after the
    # update.
    gathers = 2 * micro_batches if strategy in ("fsdp", "zero3") else 1
    # zero2 and zero3 keep only shards of gradients, so each backward reduces them. With zero1, and with fsdp unless
    # `reduce_after` says otherwise, only the last backward does.
    reduces_each = strategy in ("zero2", "zero3") or spec.cluster.reduce_after == "micro_batch"
    reductions = micro_batches if reduces_each else 1
    size = bytes_of(spec.cluster.reduce_precision) * trained_parameters
    gathered_size = gathered_bytes(spec, parameters, float32_parameters)
    remote_bytes = size * (ranks - 1) // ranks
    kept_size = outside if strategy == "fsdp" else 0

    def gather(name: str, total: int, times: int, messages: int = 1) -> Exchange:
        sent_bytes = total * (ranks - 1) // ranks
        return Exchange(name, ranks, total // ranks, sent_bytes, times, links.scaled(sent_bytes, messages))

    return [
        gather(weights, gathered_size - kept_size, gathers, messages),
        *([gather("weights of embedding and output", kept_size, micro_batches)] if kept_size else []),
        # Gradients outside blocks are one more message.
        Exchange(
            gradients, ranks, size, remote_bytes, reductions, links.scaled(remote_bytes, messages + bool(kept_size))
        ),
        *_exchanges_between_groups(spec, gradients, size // ranks, layout, groups, reductions),
    ]


def _exchanges_between_groups(
    spec: RunSpec, name: str, shard_size: int, layout: Layout, groups: list[list[int]], times: int
) -> list[Exchange]:
    """Return the exchange by which groups of hybrid sharding sum their shards of gradients; none with a single group.

    The groups of the first shard group come first in `groups`.
    """
    replicas = spec.cluster.max_world_size // spec.cluster.shard_ranks
    if replicas == 1:
        return []
    # A shard group (one copy of the model) has a group in `groups` for each share of the experts, or only one group.
    shares = len(groups) // replicas
    rows = [zip(*groups[share::shares], strict=True) for share in range(shares)]
    replica_groups = [list(ranks) for row in rows for ranks in row]
    links = group_loads(map(layout.spread, replica_groups), ring_pattern)
    sent_bytes = 2 * shard_size * (replicas - 1) // replicas
    link_loads = links.scaled(sent_bytes, rounds=2)
    return [Exchange(f"{name}, between groups", replicas, shard_size, sent_bytes, times, link_loads)]


def _micro_batches(spec: RunSpec) -> int:
    return spec.train.micro_batches // spec.cluster.max_world_size
