"""Bytes that ranks exchange in one training step."""

from typing import NamedTuple

from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.planner.units import FLOAT32, INT64, compute_bytes
from mhmoe_ray.spec import RunSpec


class Exchange(NamedTuple):
    """A collective, as one rank sees it."""

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

    @property
    def sent_per_step(self) -> int:
        return self.sent * self.times


def exchanges(spec: RunSpec) -> list[Exchange]:
    """All of a step: rows to experts and back in each layer and micro-batch; gradients; weights, where ranks hold
    slices. None on a single rank."""
    cluster, model, moe = spec.cluster, spec.model, spec.model.moe
    found = sizes(model)
    micro_batches = spec.train.micro_batches // cluster.workers.max
    result = []
    if moe is not None and cluster.ep > 1:
        passes = model.moe_layers * micro_batches
        rows = spec.train.micro_batch_size * spec.data.seq_len * moe.top_k * model.d_model * compute_bytes(spec)
        result.append(_all_to_all("counts per expert", cluster.ep, INT64 * moe.experts, passes))
        for name in ("rows to experts", "outputs back", "gradients of outputs to experts", "gradients of rows back"):
            result.append(_all_to_all(name, cluster.ep, rows, passes))
    shared = FLOAT32 * (found.parameters - found.expert_parameters)
    result += _made_whole(cluster.strategy, "all but experts", cluster.workers.max, shared, micro_batches)
    if moe is not None:
        slices = cluster.strategy != "fsdp" or cluster.shard_experts
        experts = FLOAT32 * found.expert_parameters // cluster.ep
        result += _made_whole(cluster.strategy if slices else "ddp", "experts", cluster.dp, experts, micro_batches)
    return [exchange for exchange in result if exchange.ranks > 1]


def _made_whole(strategy: str, what: str, ranks: int, size: int, micro_batches: int) -> list[Exchange]:
    """Of so many bytes of weights: gradients, and weights where ranks hold slices.

    Those are put together for each forward and each backward, or by ZeRO 1 and 2 once, after the update. ZeRO 2 and 3
    reduce gradients in each backward, as they keep no whole ones; the others in the last.
    """
    gradients, weights = f"gradients of {what}", f"weights of {what}"
    if strategy == "ddp":
        return [_all_reduce(gradients, ranks, size)]
    gathers = 2 * micro_batches if strategy in ("fsdp", "zero3") else 1
    reductions = micro_batches if strategy in ("zero2", "zero3") else 1
    away = size * (ranks - 1) // ranks
    return [
        Exchange(weights, ranks, size // ranks, away, gathers),
        Exchange(gradients, ranks, size, away, reductions),
    ]


def _all_to_all(name: str, ranks: int, size: int, times: int) -> Exchange:
    away = size * (ranks - 1) // ranks
    return Exchange(name, ranks, away, away, times)


def _all_reduce(name: str, ranks: int, payload: int) -> Exchange:
    return Exchange(name, ranks, payload, 2 * payload * (ranks - 1) // ranks, 1)
