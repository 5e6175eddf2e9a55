"""The expert step: what routed rows cost in arithmetic and in bytes moved, in one layer on one rank."""

from typing import NamedTuple

from mhmoe_ray.planner.sizes import feed_forward_macs
from mhmoe_ray.planner.units import compute_bytes
from mhmoe_ray.spec import ModelSpec, RunSpec


class ExpertStep(NamedTuple):
    """Forward of one micro-batch; with expert parallelism, what a rank gets when routing is uniform."""

    rows: int
    """R = N * h * k routed rows of width d/h."""
    flops: int
    """A multiply-add counts as two."""
    bytes: int
    """Operands and results of the matrix products, each counted once: rows in, hidden rows out and in, rows out, and
    the weights of all experts held here. What is computed between the products is taken as fused with them."""

    @property
    def intensity(self) -> float:
        """FLOPs per byte: below the machine's own ratio, the step waits for memory."""
        return self.flops / self.bytes


def expert_step(spec: RunSpec) -> ExpertStep | None:
    """None for a dense model."""
    model, moe = spec.model, spec.model.moe
    if moe is None:
        return None
    width = model.d_model // moe.heads
    rows = spec.tokens_per_micro_batch * moe.heads * moe.top_k
    values = _products(model) * (rows * (width + moe.d_expert) + moe.experts // spec.cluster.ep * width * moe.d_expert)
    return ExpertStep(rows, 2 * rows * feed_forward_macs(model, width, moe.d_expert), values * compute_bytes(spec))


def _products(model: ModelSpec) -> int:
    """Matrix products in an expert, each between width d/h and width f."""
    return feed_forward_macs(model, 1, 1)
