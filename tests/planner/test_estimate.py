"""Tests of the estimated time of a step, against small cases that are computed by hand; no GPU is measured."""

import pytest

from mhmoe_ray.planner.estimate import estimate_step_time, exchange_time
from mhmoe_ray.planner.expert_step import expert_step
from mhmoe_ray.planner.kernels import launches_per_micro_batch
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.parts import STEP_PARTS
from mhmoe_ray.planner.placement import build_layout, hypothetical_nodes, pack_workers, single_node_layout
from mhmoe_ray.planner.sizes import flops_per_token, model_parts
from mhmoe_ray.planner.traffic import all_exchanges
from tests.support.specs import tiny_spec

PLAIN = {"share": 1, "node": {"latency": 0}, "domain": {"latency": 0}, "between": {"latency": 0}}


def spec_of(network=None, accelerator=None, model=None, train=None, **cluster):
    """Return a bfloat16 spec with one group of four ranks, whose launches take no time, on a network without latencies
    unless `network` has some."""
    network = {
        key: {**PLAIN[key], **value} if isinstance(value, dict) else value for key, value in (network or {}).items()
    }
    cluster = {
        "workers": 4,
        "ep": 4,
        "network": {**PLAIN, **network},
        "accelerator": {"launch_seconds": 0, **(accelerator or {})},
        **cluster,
    }
    return tiny_spec(cluster=cluster, model=model or {}, train={"precision": "bfloat16", **(train or {})})


def two_nodes(spec, nodes_per_domain=None):
    """Return the layout of four ranks on two nodes."""
    return build_layout(pack_workers(hypothetical_nodes(2, 2, 2, nodes_per_domain), 1, 1, 4), spec.cluster.ep)


def times_by_name(spec, layout):
    return {e.name: exchange_time(e, spec, layout) for e in all_exchanges(spec, layout)}


def test_an_exchange_waits_for_its_slowest_link():
    """The rows of 2 x 16 tokens, each routed twice, with 32 values of 2 bytes, have 4,096 bytes. Each of the four ranks
    gets a quarter, so 2,048 bytes go to the other node and 1,024 stay within the node."""
    spec = spec_of({"node": {"bandwidth": 1000}, "domain": {"bandwidth": 100}})
    assert times_by_name(spec, two_nodes(spec))["rows to experts"] == (
        "rows to experts",
        2048 / 100,
        "links between nodes",
    )
    quick = spec_of({"node": {"bandwidth": 10}, "domain": {"bandwidth": 100}})
    assert times_by_name(quick, two_nodes(quick))["rows to experts"] == (
        "rows to experts",
        1024 / 10,
        "links within nodes",
    )
    half = spec_of({"share": 0.5, "node": {"bandwidth": 1000}, "domain": {"bandwidth": 100}})
    assert times_by_name(half, two_nodes(half))["rows to experts"].seconds == 2 * 2048 / 100


def test_ranks_of_a_node_share_a_link_of_the_node():
    spec = spec_of({"node": {"bandwidth": 1e6}, "between": {"bandwidth": 100, "per": "node"}})
    time = times_by_name(spec, two_nodes(spec, nodes_per_domain=1))["rows to experts"]
    assert time == ("rows to experts", 2 * 2048 / 100, "links between domains")


def test_latencies_of_consecutive_messages_add_up():
    fast = {"bandwidth": 1e15}
    spec = spec_of({"node": {**fast, "latency": 1}, "domain": {**fast, "latency": 10}})
    times = times_by_name(spec, two_nodes(spec))
    # One message goes to the neighbour, and one to each of the two ranks of the other node.
    assert times["rows to experts"].seconds == pytest.approx(1 + 2 * 10)
    assert times["rows to experts"].bound == "latency"
    # The gradients go twice around a ring of the four ranks. Once around is two steps within nodes and one between
    # them.
    assert times["gradients of all but experts"].seconds == pytest.approx(2 * (2 * 1 + 10))


def test_a_ring_leaves_a_node_by_all_its_ranks():
    spec = spec_of({"node": {"bandwidth": 1e15}, "domain": {"bandwidth": 100}})
    layout = two_nodes(spec)
    gradients = next(e for e in all_exchanges(spec, layout) if e.name == "gradients of all but experts")
    assert exchange_time(gradients, spec, layout).seconds == pytest.approx(gradients.sent_bytes / 2 / 100)


def test_compute_time_is_the_longer_of_flops_and_bytes():
    bound_by_flops = spec_of(accelerator={"bfloat16_flops": 1e6, "flops_share": 0.5, "memory_bandwidth": 1e15})
    dense, experts, _ = estimate_step_time(bound_by_flops, two_nodes(bound_by_flops)).compute_times
    tokens = 2 * 16
    routed = next(p.macs for p in model_parts(bound_by_flops.model) if p.name == "experts")
    assert experts == ("experts", pytest.approx(tokens * 3 * 2 * routed / 0.5e6), "compute")
    assert dense.seconds == pytest.approx(
        tokens * 3 * (flops_per_token(bound_by_flops.model, 16).forward - 2 * routed) / 0.5e6
    )
    bound_by_bytes = spec_of(accelerator={"bfloat16_flops": 1e15, "memory_bandwidth": 1e3, "memory_share": 0.5})
    dense, experts, update = estimate_step_time(bound_by_bytes, two_nodes(bound_by_bytes)).compute_times
    assert experts == ("experts", pytest.approx(3 * expert_step(bound_by_bytes).bytes / 500), "memory bandwidth")
    assert dense.bound == "memory bandwidth"
    state = compute_memory(bound_by_bytes)
    assert update.seconds == pytest.approx((2 * state.weights + 2 * state.moments + state.gradients) / 500)


def test_a_cpu_does_not_compute_during_launches():
    accelerator = {"launch_seconds": 1e-3, "bfloat16_flops": 1e6}
    waits = {}
    for gpus in (0, 1):
        spec = spec_of(accelerator=accelerator, gpus_per_worker=gpus)
        times = estimate_step_time(spec, two_nodes(spec)).compute_times
        waits[gpus] = [time.seconds for time in times if time.name == "waiting for launches"]
    assert waits == {0: [pytest.approx(1e-3 * launches_per_micro_batch(spec_of()))], 1: []}


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_has_all_its_micro_batches_and_all_their_layers(tied):
    """The model has three layers of experts, and each of four ranks has two micro-batches."""
    moe = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24, "every": 1}
    spec = spec_of(
        network={"node": {"bandwidth": 1000}, "domain": {"bandwidth": 100}},
        accelerator={"bfloat16_flops": 1e15, "memory_bandwidth": 1e3, "memory_share": 0.5},
        model={"layers": 3, "d_ff": None, "moe": moe, "tied_embeddings": tied},
        train={"micro_batches": 8},
    )
    result = estimate_step_time(spec, two_nodes(spec))
    dense, experts, _ = result.compute_times
    forward_and_backward, micro_batches, layers, width = 3, 2, 3, 2  # width: bytes of a bfloat16 value
    # Each layer has four projections of attention, the head and merge projections with their biases, and 16 router
    # weights for each expert. The output matrix is read once, also if it is tied to the embedding.
    weight_values = layers * (4 * 32 * 32 + 2 * (32 * 32 + 32) + 4 * 16) + 300 * 32
    assert dense == (
        "all but experts",
        pytest.approx(forward_and_backward * micro_batches * width * weight_values / 500),
        "memory bandwidth",
    )
    # This rank has one expert, with three matrices of 16 x 24 values. It gets 128 rows: 2 x 16 tokens with 2 sub-tokens
    # each, routed twice.
    values = 3 * (128 * (16 + 24) + 16 * 24)
    assert experts == (
        "experts",
        pytest.approx(forward_and_backward * micro_batches * layers * width * values / 500),
        "memory bandwidth",
    )
    # A rank sends half of its rows to the other node. It has the rows of 2 x 16 tokens, routed twice, with 32 values
    # for each route of a token. They go there and back in the forward pass and in the backward pass. It also sends the
    # number of rows, an int64, to each of the two ranks on the other node.
    remote_bytes = 4 * 32 * 2 * 32 * width / 2 + 2 * 8
    assert result.exchange_times[0] == (
        "rows to experts and back",
        pytest.approx(micro_batches * layers * remote_bytes / 100),
        "links between nodes",
    )


@pytest.mark.parametrize(
    ("recompute", "ep", "passes", "mixture_passes", "expert_passes"),
    [
        ("none", 4, 3, 3, 3),
        ("experts", 1, 3, 3, 3 + 2 / 3),
        ("exchange", 1, 4, 4, 4),
        ("exchange", 4, 4, 3, 3 + 2 / 3),
        ("block", 4, 4, 4, 4),
    ],
)
def test_recomputation_costs_another_forward_of_its_part(recompute, ep, passes, mixture_passes, expert_passes):
    """The embedding and the output layer are never recomputed. `experts` recomputes only the hidden rows of experts, by
    two of their three products. `exchange` recomputes blocks. But in blocks whose experts are distributed over ranks,
    it keeps projections, router and shared expert, and recomputes only the hidden rows of experts."""
    accelerator = {"bfloat16_flops": 1e6, "flops_share": 1, "memory_bandwidth": 1e15}
    model = {**tiny_spec().model.model_dump(), "moe": {"experts": 4, "d_expert": 24, "d_shared": 16, "every": 2}}
    cluster = {"workers": 4, "ep": ep, "accelerator": accelerator}
    train = {"precision": "bfloat16", "recompute": recompute}
    spec = tiny_spec(cluster=cluster, model=model, train=train)
    seconds = {time.name: time.seconds for time in estimate_step_time(spec, single_node_layout(4, ep)).compute_times}
    macs = {part.name: part.layers * part.macs for part in model_parts(spec.model)}
    expert_parts = ("projections", "router", "shared expert")
    mixture_flops, output_flops = 2 * sum(macs[name] for name in expert_parts), 2 * macs["output"]
    routed, tokens = macs["experts"], 2 * 16
    other_flops = flops_per_token(spec.model, 16).forward - 2 * routed - mixture_flops - output_flops
    flops = passes * other_flops + mixture_passes * mixture_flops + 3 * output_flops
    assert seconds["all but experts"] == pytest.approx(tokens * flops / 1e6)
    assert seconds["experts"] == pytest.approx(tokens * expert_passes * 2 * routed / 1e6)


def test_step_time_lies_between_its_longest_part_and_the_sum_of_its_parts():
    spec = spec_of()
    result = estimate_step_time(spec, two_nodes(spec))
    part_seconds = [time.seconds for time in [*result.compute_times, *result.exchange_times]]
    assert result.sequential_seconds == pytest.approx(sum(part_seconds))
    # Layers one by one take at least as long as all but experts together, whose bytes and FLOPs overlap.
    assert sum(result.part_seconds.values()) >= result.sequential_seconds * (1 - 1e-9)
    assert result.part_seconds.keys() <= {*STEP_PARTS}
    assert max(part_seconds) <= result.overlapped_seconds <= result.sequential_seconds
    assert result.longest_part.seconds == max(part_seconds)
    peak = 3 * flops_per_token(spec.model, 16).forward * 32 / 989e12
    assert result.peak_seconds == pytest.approx(peak)
    single_rank = tiny_spec()
    layout = build_layout(pack_workers(hypothetical_nodes(1, 1, 1), 1, 1, 1), 1)
    assert estimate_step_time(single_rank, layout).exchange_times == []
    assert (
        estimate_step_time(single_rank, layout).sequential_seconds
        == estimate_step_time(single_rank, layout).overlapped_seconds
    )
