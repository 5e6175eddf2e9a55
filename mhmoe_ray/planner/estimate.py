"""How long a training step takes, by arithmetic alone: an estimate, not checked on GPUs.

Matrix products take as long as their FLOPs at the share of the peak that `cluster.accelerator` states, or as their
bytes at its share of memory bandwidth, whichever is longer; a backward costs two forwards. All but the experts is
counted in bytes as its weights alone, read once in each pass. An exchange takes as long as the class of links that its
most loaded rank waits for longest, by bytes over bandwidth, and the latency of its messages, one after another.

Not in it: norms, routing and permutation of rows, what experts compute anew by `moe.recompute`, the data stream,
checkpoints, stragglers, congestion, and routing that is not uniform.
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
"""What a part may be bound by."""


class Time(NamedTuple):
    name: str
    seconds: float
    """Of a step."""
    bound: str
    """What takes the most of it."""


class Estimate(NamedTuple):
    computing: list[Time]
    exchanging: list[Time]
    flops: float
    """Of a step on one rank, what is computed anew aside, over its peak: seconds."""
    tokens: int
    """Of a step."""
    layout: Layout
    """Of the ranks that do it."""

    @property
    def in_turn(self) -> float:
        """Seconds of a step in which nothing overlaps."""
        return sum(time.seconds for time in [*self.computing, *self.exchanging])

    @property
    def overlapped(self) -> float:
        """Seconds of one in which all exchanges run behind the computation, or it behind them: no step is quicker."""
        return max(sum(time.seconds for time in part) for part in (self.computing, self.exchanging))

    @property
    def longest(self) -> Time:
        return max([*self.computing, *self.exchanging], key=lambda time: time.seconds)


def estimate(spec: RunSpec, layout: Layout) -> Estimate:
    """Of a run whose ranks are laid out so."""
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
    """In forwards, of a forward and a backward: with train.recompute one more of all that is in blocks. Where experts
    are spread, of what follows the second norm of their blocks only their hidden rows, by a kernel that does as told:
    all but the last of their products."""
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
    """Of all its times in a step."""
    network, bytes_took, latency = spec.cluster.network, {}, 0.0
    for name, sends in zip(Links._fields, exchange.links, strict=True):
        link = getattr(network, name)
        sharing = max(map(len, layout.on_nodes)) if link.per == "node" else 1
        bytes_took[LINKS[name]] = sends.most * sharing / (link.bandwidth * network.share)
        latency += sends.messages * link.latency
    slowest = max(bytes_took, key=lambda name: bytes_took[name])
    bound = slowest if bytes_took[slowest] > latency else LATENCY
    return Time(exchange.name, exchange.times * (bytes_took[slowest] + latency), bound)
