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
    """Bytes of it that leave the rank: all of an all-to-all's, of an all-reduce's those of a ring."""
    times: int
    """In a step."""

    @property
    def sent_per_step(self) -> int:
        return self.sent * self.times


def exchanges(spec: RunSpec) -> list[Exchange]:
    """All of a step: rows to experts and back in each layer and micro-batch, gradients once. None on a single rank."""
    cluster, model, moe = spec.cluster, spec.model, spec.model.moe
    found = sizes(model)
    passes = model.moe_layers * spec.train.micro_batches // cluster.workers
    result = []
    if moe is not None and cluster.ep > 1:
        rows = spec.train.micro_batch_size * spec.data.seq_len * moe.top_k * model.d_model * compute_bytes(spec)
        result.append(_all_to_all("counts per expert", cluster.ep, INT64 * moe.experts, passes))
        for name in ("rows to experts", "outputs back", "gradients of outputs to experts", "gradients of rows back"):
            result.append(_all_to_all(name, cluster.ep, rows, passes))
    experts = FLOAT32 * found.expert_parameters // cluster.ep
    shared = FLOAT32 * (found.parameters - found.expert_parameters)
    result.append(_all_reduce("gradients of all but experts", cluster.workers, shared))
    if moe is not None:
        result.append(_all_reduce("gradients of experts", cluster.dp, experts))
    return [exchange for exchange in result if exchange.ranks > 1]


def _all_to_all(name: str, ranks: int, size: int, times: int) -> Exchange:
    away = size * (ranks - 1) // ranks
    return Exchange(name, ranks, away, away, times)


def _all_reduce(name: str, ranks: int, payload: int) -> Exchange:
    return Exchange(name, ranks, payload, 2 * payload * (ranks - 1) // ranks, 1)
