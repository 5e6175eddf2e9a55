"""The expert step on paper: the kernel that `auto` selects, arithmetic and bytes moved, and the share of routes
dropped.

A run chooses its kernel by `mhmoe_kernels.choose`; here the choice is predicted, because nothing runs yet.
"""

import math
from typing import NamedTuple

from mhmoe_kernels.abilities import KERNELS, KernelName
from mhmoe_ray.planner.sizes import compute_bytes
from mhmoe_ray.spec import ModelSpec, MoESpec, RunSpec


def assumed_kernel(spec: RunSpec) -> KernelName | None:
    """Return the kernel that experts are expected to run on; None for a dense model.

    For `auto` this is `triton` on GPUs where it applies (bfloat16, narrow enough rows), and otherwise `grouped`. CPUs
    are assumed to have no AMX: with AMX, `auto` is `cpp`, which keeps less memory.
    """
    moe = spec.model.moe
    if moe is None or moe.kernel != "auto":
        return moe.kernel if moe else None
    narrow = spec.model.d_model // moe.heads <= (KERNELS["triton"].auto_widest_row or 0)
    fused = spec.cluster.gpus_per_worker and spec.train.precision == "bfloat16" and narrow
    return "triton" if fused else "grouped"


def may_be_compiled(spec: RunSpec) -> bool:
    """Whether `auto` would select `cpp` on CPUs with AMX."""
    model, moe, limits = spec.model, spec.model.moe, KERNELS["cpp"]
    if moe is None or moe.kernel != "auto" or spec.cluster.gpus_per_worker:
        return False
    fits = not (model.d_model // moe.heads % limits.sizes or moe.d_expert % limits.sizes)
    computes = limits.function == model.architecture.expert_function
    return fits and computes and spec.train.precision == limits.precision


def planned_model(spec: RunSpec) -> ModelSpec:
    """Return the model as training computes it, with the kernel of `assumed_kernel`."""
    model, kernel = spec.computed_model, assumed_kernel(spec)
    if model.moe is None:
        return model
    return model.model_copy(update={"moe": model.moe.model_copy(update={"kernel": kernel})})


class ExpertStep(NamedTuple):
    """Forward of one micro-batch through the experts of one layer; with expert parallelism, the part of one rank under
    uniform routing."""

    rows: int
    """Number of routed rows R = N * h * k, each of width d/h."""
    flops: int
    """FLOPs of the matrix products; a multiply-add counts as two."""
    bytes: int
    """Bytes of the operands and results of the matrix products, each counted once: rows in, hidden rows out and in,
    rows out, and the weights of all experts held on the rank. Computation between the products is assumed to be fused
    with them."""

    @property
    def intensity(self) -> float:
        """FLOPs per byte; if this is below the machine's own ratio, the step is bound by memory bandwidth."""
        return self.flops / self.bytes


def expert_step(spec: RunSpec) -> ExpertStep | None:
    """Return the expert step of a run; None for a dense model."""
    model, moe = spec.model, spec.model.moe
    if moe is None:
        return None
    width = model.d_model // moe.heads
    rows = spec.tokens_per_micro_batch * moe.heads * moe.top_k
    values = model.architecture.expert_matrices * (
        rows * (width + moe.d_expert) + moe.experts // spec.cluster.ep * width * moe.d_expert
    )
    flops = 2 * rows * model.architecture.expert_macs(width, moe.d_expert)
    return ExpertStep(rows, flops, values * compute_bytes(spec))


def dropped_by_chance(moe: MoESpec, rows: int) -> float:
    """Return the share of routes that exceed expert capacity, if each row chooses its k experts uniformly at random and
    keeps all of them.

    The load of an expert is then binomial, with N draws at k / E. A router that favours some experts drops more; one
    whose loads are more even than chance drops fewer. With `second_expert: random` this is an upper bound on what
    chance drops: second choices that are left out need no slot and leave it to others. The share is 0 if routing is
    dropless.
    """
    places, p = moe.places(rows), moe.top_k / moe.experts
    if places is None or places >= rows:
        return 0.0
    if p == 1:
        return 1 - places / rows
    mean, spread = rows * p, math.sqrt(rows * p * (1 - p))
    # Farther out, or 30 rows farther where the distribution is narrow and has a long tail, no load is ever seen.
    likely = range(max(places + 1, math.floor(mean - 12 * spread)), min(rows, math.ceil(mean + 12 * spread) + 30) + 1)
    return sum((load - places) * _chance(load, rows, p) for load in likely) / mean


def _chance(load: int, rows: int, p: float) -> float:
    """Return the binomial probability that an expert gets `load` of `rows` rows, each with probability p."""
    ways = math.lgamma(rows + 1) - math.lgamma(load + 1) - math.lgamma(rows - load + 1)
    return math.exp(ways + load * math.log(p) + (rows - load) * math.log1p(-p))
