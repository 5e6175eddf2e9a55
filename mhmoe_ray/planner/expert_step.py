"""Predictions for a layer's experts on one micro-batch: FLOPs and bytes, and dropped routes."""

import math
from typing import NamedTuple

from mhmoe_ray.planner.sizes import bytes_per_value, merge_macs
from mhmoe_ray.spec import MoESpec, RunSpec


class ExpertStep(NamedTuple):
    """Rows, FLOPs and bytes of a micro-batch's forward through a layer's experts, on a rank under uniform routing."""

    rows: int
    """Number of routed rows N * h * k, each of a sub-token's width."""
    flops: int
    """FLOPs of the matrix products; a multiply-add counts as two."""
    bytes: int
    """Bytes of the rows read, the hidden rows written and read again, the results written, and the weights of the
    rank's experts, if the products are fused with the operations between them."""

    @property
    def intensity(self) -> float:
        """The FLOPs per byte. Below the accelerator's ratio of FLOP/s to bytes/s, memory bandwidth bounds the step."""
        return self.flops / self.bytes


def expert_step(spec: RunSpec) -> ExpertStep | None:
    """Return the rows, FLOPs and bytes of a layer's experts for one micro-batch of a run; None for a dense model.

    With the router `smear`, all experts are read, and each sample's averaged expert is written and read.
    """
    model, moe = spec.model, spec.model.moe
    if moe is None:
        return None
    width = model.row_width
    rows = spec.tokens_per_micro_batch * moe.heads * moe.top_k
    merged_experts = spec.samples_per_micro_batch if moe.router == "smear" else 0
    values = model.architecture.expert_matrices * (
        rows * (width + moe.d_expert) + (moe.experts // spec.cluster.ep + 2 * merged_experts) * width * moe.d_expert
    )
    flops = 2 * (rows * model.architecture.expert_macs(width, moe.d_expert) + merged_experts * merge_macs(model))
    return ExpertStep(rows, flops, values * bytes_per_value(spec))


def expected_drop_share(moe: MoESpec, rows: int) -> float:
    """Return the share of routes that an expert capacity drops if each row chooses its k experts uniformly at random.

    A router that prefers some experts drops more, and one with more even loads fewer. With `second_expert: random` the
    share is an upper bound, because second choices that are left out need no slot. `rows` are those of a micro-batch.
    """
    # The load of an expert is binomially distributed, with `rows` draws of probability k / E.
    capacity, p = moe.expert_capacity(rows), moe.top_k / moe.experts
    if capacity is None or capacity >= rows:
        return 0.0
    # If p is 1, each row chooses all experts, so nothing is random, and log(1 - p) would be infinite.
    if p == 1:
        return 1 - capacity / rows
    mean, deviation = rows * p, math.sqrt(rows * p * (1 - p))
    if deviation > 10_000:
        # The distribution is a normal one with at least four exact digits, and the sum below would take seconds.
        z = (capacity - mean) / deviation
        density, tail = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), math.erfc(z / math.sqrt(2)) / 2
        return max(0.0, deviation * (density - z * tail) / mean)
    # Loads beyond 12 standard deviations are too improbable to matter. At a small mean, the tail is longer than that of
    # a normal distribution, so 30 rows are added.
    likely_loads = range(
        max(capacity + 1, math.floor(mean - 12 * deviation)), min(rows, math.ceil(mean + 12 * deviation) + 30) + 1
    )
    return sum((load - capacity) * _binomial_probability(load, rows, p) for load in likely_loads) / mean


def _binomial_probability(load: int, rows: int, p: float) -> float:
    log_ways = math.lgamma(rows + 1) - math.lgamma(load + 1) - math.lgamma(rows - load + 1)
    return math.exp(log_ways + load * math.log(p) + (rows - load) * math.log1p(-p))
