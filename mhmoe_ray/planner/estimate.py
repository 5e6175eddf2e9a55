"""Time of a training step, computed from the spec: an estimate, not checked on GPUs.

Matrix products take the longer of two times: their FLOPs at the share of the peak that `cluster.accelerator` states,
and their bytes at its share of memory bandwidth. A backward costs two forwards. The bytes of everything but the experts
are those of its weights alone, read once in each pass. The time of an exchange is the sum of two: bytes over bandwidth
on the class of links that its most loaded rank waits for longest, and the latency of its messages, one after another.

The estimate leaves out norms, routing and permutation of rows, what experts recompute by `moe.recompute`, the data
stream, checkpoints, stragglers, congestion, and routing that is not uniform.
"""

from typing import NamedTuple

from mhmoe_ray.planner.expert_step import expert_step, planned_model
from mhmoe_ray.planner.memory import memory
from mhmoe_ray.planner.placement import Layout
from mhmoe_ray.planner.sizes import (
    EXPERTS,
    PROJECTIONS,
    ROUTER,
    SHARED,
    compute_bytes,
    flops_per_token,
    parts,
    sizes,
)
from mhmoe_ray.planner.traffic import Exchange, Links, dispatches, reductions
from mhmoe_ray.spec import RunSpec

COMPUTE, MEMORY, LATENCY = "compute", "memory bandwidth", "latency"
LINKS = {"node": "links within nodes", "domain": "links between nodes", "between": "links between domains"}
"""Names of the resources that may bound a part of the step; LINKS has those of the link classes, by their key in
`cluster.network`."""


class Time(NamedTuple):
    name: str
    seconds: float
    """Seconds per training step."""
    bound: str
    """Name of the resource that takes most of that time."""


class Estimate(NamedTuple):
    computing: list[Time]
    exchanging: list[Time]
    flops: float
    """Seconds that the FLOPs of a step on one rank take at the accelerator's peak; recomputation does not count."""
    tokens: int
    """Number of tokens per step."""
    layout: Layout
    """Placement of the ranks on nodes."""

    @property
    def in_turn(self) -> float:
        """Seconds per step if nothing overlaps."""
        return sum(time.seconds for time in [*self.computing, *self.exchanging])

    @property
    def overlapped(self) -> float:
        """Seconds per step if all exchanges overlap with computation: the longer of the two. No step is faster."""
        return max(sum(time.seconds for time in part) for part in (self.computing, self.exchanging))

    @property
    def longest(self) -> Time:
        return max([*self.computing, *self.exchanging], key=lambda time: time.seconds)


def estimate(spec: RunSpec, layout: Layout) -> Estimate:
    """Estimate the time per training step of a run with the given placement of ranks."""
    rank_tokens = spec.tokens_per_step / len(layout.nodes)
    training = flops_per_token(spec.model, spec.data.seq_len).training
    return Estimate(
        _computing(spec, rank_tokens),
        _exchanging(spec, layout),
        training * rank_tokens / spec.cluster.accelerator.peak(spec.train.precision),
        spec.tokens_per_step,
        layout,
    )


def _computing(spec: RunSpec, tokens: float) -> list[Time]:
    model, moe, accelerator = spec.model, spec.model.moe, spec.cluster.accelerator
    micro_batches = tokens / spec.tokens_per_micro_batch
    speed = accelerator.peak(spec.train.precision) * accelerator.flops_share
    moved = accelerator.memory_bandwidth * accelerator.memory_share

    def products(name: str, flops: float, size: float) -> Time:
        return max(Time(name, flops / speed, COMPUTE), Time(name, size / moved, MEMORY), key=lambda time: time.seconds)

    step = expert_step(spec)
    others = [(part, _passes(spec, part.name)) for part in parts(model) if part.macs and part.name != EXPERTS]
    scores = flops_per_token(model, spec.data.seq_len).forward - 2 * sizes(model).macs_per_token
    flops = _passes(spec, "attention") * scores + sum(passes * 2 * p.layers * p.macs for p, passes in others)
    # A tied output has no parameters of its own: its product reads the embedding.
    weights = sum(passes * p.layers * (p.parameters or p.macs) for p, passes in others)
    read = micro_batches * compute_bytes(spec) * weights
    times = [products("all but experts", tokens * flops, read)]
    if step and moe:
        runs = _passes(spec, EXPERTS) * micro_batches * model.moe_layers
        times.append(products("experts", runs * step.flops, runs * step.bytes))
    held = memory(spec)
    update = 2 * (held.weights + held.moments) + held.gradients  # read, and but for gradients written
    return [*times, Time("update of weights", update / moved, MEMORY)]


def _passes(spec: RunSpec, part: str) -> float:
    """Return the cost of a part's forward and backward, in units of its forward.

    It is 3, or 4 for all parts in blocks with `train.recompute`. Where experts are spread over ranks, a block's part
    after its second norm is not recomputed as a whole: only the hidden rows of experts are, by a kernel that follows
    `moe.recompute` ("as told"), which repeats all but the last of an expert's matrix products.
    """
    if not spec.train.recompute or part == "output":
        return 3
    if spec.cluster.ep == 1 or part not in (PROJECTIONS, ROUTER, EXPERTS, SHARED):
        return 4
    moe = planned_model(spec).moe
    if part != EXPERTS or moe is None or moe.kernel_limits.keeps != "as told":
        return 3
    products = spec.model.architecture.expert_matrices
    return 3 + (products - 1) / products


def _exchanging(spec: RunSpec, layout: Layout) -> list[Time]:
    dispatch = [seconds(e, spec, layout) for e in dispatches(spec, layout)]
    times = [seconds(e, spec, layout) for e in reductions(spec, layout)]
    if dispatch:
        longest = max(dispatch, key=lambda time: time.seconds)
        times.insert(0, Time("rows to experts and back", sum(t.seconds for t in dispatch), longest.bound))
    return times


def seconds(exchange: Exchange, spec: RunSpec, layout: Layout) -> Time:
    """Return the seconds per step of an exchange, over all its calls, and what bounds it."""
    network, bytes_took, latency = spec.cluster.network, {}, 0.0
    for name, sends in zip(Links._fields, exchange.links, strict=True):
        link = getattr(network, name)
        sharing = max(map(len, layout.on_nodes)) if link.per == "node" else 1
        bytes_took[LINKS[name]] = sends.most * sharing / (link.bandwidth * network.share)
        latency += sends.messages * link.latency
    slowest = max(bytes_took, key=lambda name: bytes_took[name])
    bound = slowest if bytes_took[slowest] > latency else LATENCY
    return Time(exchange.name, exchange.times * (bytes_took[slowest] + latency), bound)
