"""Estimate of the time of a training step from the spec. It has not been compared with measurements on GPUs.

Matrix products take the longer of two times: that of their FLOPs, and that of their bytes. `cluster.accelerator` gives
the shares of the peak and of the memory bandwidth that they reach. A backward costs two forwards. For layers other than
experts, only the weights count as bytes, read once per forward. The time of an exchange between ranks has two terms.
One is bytes over bandwidth, for the most loaded rank on the slowest class of links. The other is the latency of the
messages that a rank sends one after another. Kernels are launched one after another, ahead of the GPU. If the launches
take longer than the computation, the GPU waits for them. On a CPU the launches come on top, as the fixed time of each
operation (`launch_seconds`).

The estimate leaves out norms, routing and permutation of rows, recomputation that only `moe.recompute` asks for, the
data stream, checkpoints, stragglers, congestion, and routing that is not uniform. For encoders and vision models it
also leaves out the GPU's wait for launches.
"""

from collections import defaultdict
from typing import NamedTuple

from mhmoe_ray.planner import parts
from mhmoe_ray.planner.adapters import adapter_macs
from mhmoe_ray.planner.expert_step import expert_step
from mhmoe_ray.planner.family import ATTENTION, EXPERTS, OUTPUT, PROJECTIONS, ROUTER, SHARED, plan_of
from mhmoe_ray.planner.kernels import planned_model
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.placement import Layout
from mhmoe_ray.planner.sizes import bytes_per_value, compute_sizes, flops_per_token, model_parts, training_flops
from mhmoe_ray.planner.traffic import Exchange, LinkLoads, dispatch_exchanges, reduction_exchanges
from mhmoe_ray.spec import RunSpec

COMPUTE, MEMORY, LATENCY, LAUNCHES = "compute", "memory bandwidth", "latency", "launches of kernels"
LINK_NAMES = {"node": "links within nodes", "domain": "links between nodes", "between": "links between domains"}
"""Names of the link classes, by key of `cluster.network`. They and the four names above are the resources that may
bound a time."""
REMEDIES = {
    COMPUTE: "more or faster GPUs, or a smaller model, shorten it",
    MEMORY: "a larger train.micro_batch_size with fewer train.micro_batches reads the weights less often",
    LAUNCHES: "a larger train.micro_batch_size with fewer train.micro_batches launches fewer kernels",
    LATENCY: "a larger train.micro_batch_size with fewer train.micro_batches sends fewer messages",
    LINK_NAMES["node"]: "fewer ranks in an expert group (cluster.ep) exchange fewer rows",
    LINK_NAMES["domain"]: "cluster.dispatch: hierarchical, or an expert group within a node (cluster.ep), spares them",
    LINK_NAMES[
        "between"
    ]: "cluster.dispatch: hierarchical, or an expert group within a domain (cluster.ep), spares them",
}
"""Advice that shortens a computation or an exchange of rows, by the resource that bounds its time."""
UPDATE, WEIGHTS, GRADIENTS = "update of weights", "weights of ", "gradients of "
OTHER_LAYERS, LAUNCH_WAIT, ROWS = "all but experts", "waiting for launches", "rows to experts and back"
STATE_REMEDIES = {
    UPDATE: "more tokens per step (train.micro_batches) update less often, and sharding (cluster.strategy) shares it",
    WEIGHTS: "more tokens per micro-batch (train.micro_batch_size) gather less often, cluster.gather_precision: "
    "bfloat16 halves the bytes, and cluster.ep keeps experts in place",
    GRADIENTS: "more tokens per step (train.micro_batches) reduce less often, and cluster.ep shares experts out",
}
"""Advice that shortens the weight update and exchanges of weights or gradients, by the start of `StepTime.name`."""


class StepTime(NamedTuple):
    """Time per training step of one part, such as the experts or the exchange of gradients."""

    name: str
    seconds: float
    bound: str
    """Name of the resource that bounds the time."""

    @property
    def remedy(self) -> str:
        """Advice to the user that shortens this part."""
        state_remedies = [remedy for start, remedy in STATE_REMEDIES.items() if self.name.startswith(start)]
        return state_remedies[0] if state_remedies else REMEDIES[self.bound]


class Estimate(NamedTuple):
    """Estimated time of a training step, by part: computations of a rank, and exchanges between ranks."""

    compute_times: list[StepTime]
    exchange_times: list[StepTime]
    peak_seconds: float
    """Seconds of a rank's FLOPs in a step at the accelerator's peak, without recomputation."""
    tokens: int
    layout: Layout
    layer_times: list[StepTime]
    """Times of the kinds of layers which `compute_times` has as one part, "all but experts"."""

    @property
    def part_seconds(self) -> dict[str, float]:
        """The seconds of each part of a step by the names of `parts.py`."""
        names = {**parts.LAYER_PARTS, LAUNCH_WAIT: parts.IDLE, UPDATE: parts.UPDATE, ROWS: parts.EXCHANGE}
        seconds: dict[str, float] = defaultdict(float)
        for time in [*self.layer_times, *self.compute_times, *self.exchange_times]:
            if time.name != OTHER_LAYERS:
                seconds[names.get(time.name, parts.REDUCTION)] += time.seconds
        return dict(seconds)

    @property
    def sequential_seconds(self) -> float:
        """The seconds per step if nothing overlaps."""
        return sum(time.seconds for time in [*self.compute_times, *self.exchange_times])

    @property
    def overlapped_seconds(self) -> float:
        """The seconds per step if all exchanges overlap with computation, a lower bound."""
        return max(sum(time.seconds for time in part) for part in (self.compute_times, self.exchange_times))

    @property
    def longest_part(self) -> StepTime:
        return max([*self.compute_times, *self.exchange_times], key=lambda time: time.seconds)


def estimate_step_time(spec: RunSpec, layout: Layout) -> Estimate:
    """Return an estimate of the time per training step of a run, for a given placement of its ranks."""
    rank_tokens = spec.tokens_per_step / len(layout.nodes)
    step_times, layer_times = compute_times(spec, rank_tokens)
    return Estimate(
        step_times,
        _exchange_times(spec, layout),
        training_flops(spec) * rank_tokens / spec.cluster.accelerator.peak_flops(spec.train.precision),
        spec.tokens_per_step,
        layout,
        layer_times,
    )


def compute_times(spec: RunSpec, tokens: float) -> tuple[list[StepTime], list[StepTime]]:
    """Return the times of computations, and those of the kinds of layers other than experts, one by one."""
    model, moe, accelerator = spec.model, spec.model.moe, spec.cluster.accelerator
    micro_batches = tokens / spec.tokens_per_micro_batch
    flops_rate = accelerator.peak_flops(spec.train.precision) * accelerator.flops_share
    bandwidth = accelerator.memory_bandwidth * accelerator.memory_share

    def product_time(name: str, flops: float, size: float) -> StepTime:
        return max(
            StepTime(name, flops / flops_rate, COMPUTE),
            StepTime(name, size / bandwidth, MEMORY),
            key=lambda time: time.seconds,
        )

    step = expert_step(spec)
    score_flops = flops_per_token(model, spec.attention_length).forward - 2 * compute_sizes(model).macs_per_token
    # A backward computes no gradients of frozen weights, which saves one forward.
    is_frozen = spec.train.adapter is not None
    layer_work = {}  # FLOPs and bytes of each kind of layers
    for part in model_parts(model):
        if part.macs and part.name != EXPERTS:
            cost, scores = _cost_factor(spec, part.name), score_flops if part.name == ATTENTION else 0
            # A tied output has no parameters of its own, but its product reads the embedding, whose size is `macs`.
            bytes_read = bytes_per_value(spec) * part.layers * (part.parameters or part.macs)
            products = 2 * part.layers * part.macs
            flops = cost * (scores + products + 2 * adapter_macs(spec, part.name)) - is_frozen * products
            layer_work[part.name] = (tokens * flops, (cost - is_frozen) * micro_batches * bytes_read)
    times = [product_time(OTHER_LAYERS, *map(sum, zip(*layer_work.values(), strict=True)))]
    if step and moe:
        cost = _cost_factor(spec, EXPERTS)
        expert_passes = (cost - is_frozen) * micro_batches * model.moe_layers
        adapter_flops = 2 * cost * tokens * adapter_macs(spec, EXPERTS)
        times.append(product_time("experts", expert_passes * step.flops + adapter_flops, expert_passes * step.bytes))
    launch_seconds = micro_batches * plan_of(model).launches(spec) * accelerator.launch_seconds
    # Only a GPU computes while further kernels are launched.
    hidden_seconds = sum(time.seconds for time in times) if spec.cluster.gpus_per_worker else 0
    waiting_seconds = launch_seconds - hidden_seconds
    if waiting_seconds > 0:
        times.append(StepTime(LAUNCH_WAIT, waiting_seconds, LAUNCHES))
    state = compute_memory(spec)
    # The update reads weights, moments and gradients, and writes weights and moments.
    trained_weights = state.weights if spec.train.adapter is None else state.gradients
    update_bytes = 2 * (trained_weights + state.moments) + state.gradients
    times.append(StepTime(UPDATE, update_bytes / bandwidth, MEMORY))
    return times, [product_time(name, *work) for name, work in layer_work.items()]


def _cost_factor(spec: RunSpec, part: str) -> float:
    """Return the cost of the forward, backward and recomputation of a kind of layers, in units of their forward."""
    # A backward costs two forwards, and recomputation one more. The output layer is in no block, so it is not
    # recomputed.
    recompute, is_distributed = spec.train.recompute, spec.cluster.ep > 1
    if recompute == "none" or part == OUTPUT:
        return 3
    is_mixture_part = part in (PROJECTIONS, ROUTER, EXPERTS, SHARED)
    if recompute == "block" or (recompute == "exchange" and not (is_distributed and is_mixture_part)):
        return 4
    # With `exchange`, nothing after the second norm of a block with distributed experts is recomputed, except by a
    # kernel that follows `moe.recompute` ("as configured"). Such a kernel recomputes the hidden rows, which takes all
    # but the last of an expert's products. With `experts`, nothing but these hidden rows is recomputed.
    moe = planned_model(spec).moe
    if part != EXPERTS or moe is None or moe.kernel_limits.kept_rows != "as configured":
        return 3
    products = spec.model.architecture.expert_matrices
    return 3 + (products - 1) / products


def _exchange_times(spec: RunSpec, layout: Layout) -> list[StepTime]:
    dispatch_times = [exchange_time(exchange, spec, layout) for exchange in dispatch_exchanges(spec, layout)]
    times = [exchange_time(exchange, spec, layout) for exchange in reduction_exchanges(spec, layout)]
    if dispatch_times:
        longest = max(dispatch_times, key=lambda time: time.seconds)
        times.insert(0, StepTime(ROWS, sum(t.seconds for t in dispatch_times), longest.bound))
    return times


def exchange_time(exchange: Exchange, spec: RunSpec, layout: Layout) -> StepTime:
    """Return the time per step of an exchange; its bound is the slowest link class, or latency if that takes longer."""
    network, transfer_seconds, latency = spec.cluster.network, {}, 0.0
    for name, load in zip(LinkLoads._fields, exchange.links, strict=True):
        link = getattr(network, name)
        # All ranks of a node send over a shared link at the same time, so each gets a part of its bandwidth.
        ranks_per_link = max(map(len, layout.node_groups)) if link.per == "node" else 1
        transfer_seconds[LINK_NAMES[name]] = load.maximum * ranks_per_link / (link.bandwidth * network.share)
        latency += load.messages * link.latency
    slowest = max(transfer_seconds, key=lambda name: transfer_seconds[name])
    bottleneck = slowest if transfer_seconds[slowest] > latency else LATENCY
    return StepTime(exchange.name, exchange.times * (transfer_seconds[slowest] + latency), bottleneck)
