"""The arithmetic of a step's time against small cases done by hand; whether GPUs take that time is not checked here."""

import pytest

from mhmoe_ray.planner.estimate import estimate, seconds
from mhmoe_ray.planner.expert_step import expert_step
from mhmoe_ray.planner.memory import memory
from mhmoe_ray.planner.placement import laid_out, on_one_node, on_paper, packed
from mhmoe_ray.planner.sizes import flops_per_token, parts
from mhmoe_ray.planner.traffic import exchanges
from tests.specs import tiny_spec

PLAIN = {"share": 1, "node": {"latency": 0}, "domain": {"latency": 0}, "between": {"latency": 0}}


def spec_of(network=None, accelerator=None, model=None, train=None, **cluster):
    network = {
        key: {**PLAIN[key], **value} if isinstance(value, dict) else value for key, value in (network or {}).items()
    }
    cluster = {"workers": 4, "ep": 4, "network": {**PLAIN, **network}, "accelerator": accelerator or {}, **cluster}
    return tiny_spec(cluster=cluster, model=model or {}, train={"precision": "bfloat16", **(train or {})})


def two_nodes(spec, nodes_per_domain=None):
    return laid_out(packed(on_paper(2, 2, 2, nodes_per_domain), 1, 1, 4), spec.cluster.ep)


def by_name(spec, layout):
    return {e.name: seconds(e, spec, layout) for e in exchanges(spec, layout)}


def test_an_exchange_waits_for_its_slowest_link():
    """Rows of 2 x 16 tokens, twice routed, of 32 values of 2 bytes are 4,096 bytes, a quarter to each of four ranks."""
    spec = spec_of({"node": {"bandwidth": 1000}, "domain": {"bandwidth": 100}})
    assert by_name(spec, two_nodes(spec))["rows to experts"] == ("rows to experts", 2048 / 100, "links between nodes")
    quick = spec_of({"node": {"bandwidth": 10}, "domain": {"bandwidth": 100}})
    assert by_name(quick, two_nodes(quick))["rows to experts"] == ("rows to experts", 1024 / 10, "links within nodes")
    half = spec_of({"share": 0.5, "node": {"bandwidth": 1000}, "domain": {"bandwidth": 100}})
    assert by_name(half, two_nodes(half))["rows to experts"].seconds == 2 * 2048 / 100


def test_ranks_of_a_node_share_a_link_of_the_node():
    spec = spec_of({"node": {"bandwidth": 1e6}, "between": {"bandwidth": 100, "per": "node"}})
    time = by_name(spec, two_nodes(spec, nodes_per_domain=1))["rows to experts"]
    assert time == ("rows to experts", 2 * 2048 / 100, "links between domains")


def test_messages_come_one_after_another():
    fast = {"bandwidth": 1e15}
    spec = spec_of({"node": {**fast, "latency": 1}, "domain": {**fast, "latency": 10}})
    times = by_name(spec, two_nodes(spec))
    assert times["rows to experts"].seconds == pytest.approx(1 + 2 * 10)  # a neighbour and two ranks of the other node
    assert times["rows to experts"].bound == "latency"
    # A ring through four ranks, twice: two steps within nodes, one between.
    assert times["gradients of all but experts"].seconds == pytest.approx(2 * (2 * 1 + 10))


def test_a_ring_leaves_a_node_by_all_its_ranks():
    spec = spec_of({"node": {"bandwidth": 1e15}, "domain": {"bandwidth": 100}})
    layout = two_nodes(spec)
    gradients = next(e for e in exchanges(spec, layout) if e.name == "gradients of all but experts")
    assert seconds(gradients, spec, layout).seconds == pytest.approx(gradients.sent / 2 / 100)


def test_products_take_as_long_as_flops_or_bytes():
    flops = spec_of(accelerator={"bfloat16_flops": 1e6, "flops_share": 0.5, "memory_bandwidth": 1e15})
    dense, experts, _ = estimate(flops, two_nodes(flops)).computing
    tokens = 2 * 16
    routed = next(p.macs for p in parts(flops.model) if p.name == "experts")
    assert experts == ("experts", pytest.approx(tokens * 3 * 2 * routed / 0.5e6), "compute")
    assert dense.seconds == pytest.approx(tokens * 3 * (flops_per_token(flops.model, 16).forward - 2 * routed) / 0.5e6)
    moved = spec_of(accelerator={"bfloat16_flops": 1e15, "memory_bandwidth": 1e3, "memory_share": 0.5})
    dense, experts, update = estimate(moved, two_nodes(moved)).computing
    assert experts == ("experts", pytest.approx(3 * expert_step(moved).bytes / 500), "memory bandwidth")
    assert dense.bound == "memory bandwidth"
    held = memory(moved)
    assert update.seconds == pytest.approx((2 * held.weights + 2 * held.moments + held.gradients) / 500)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_has_all_its_micro_batches_and_all_their_layers(tied):
    """The model has three layers of experts, and each of four ranks has two micro-batches.

    Every number is derived anew from sizes and bytes.
    """
    moe = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24, "every": 1}
    spec = spec_of(
        network={"node": {"bandwidth": 1000}, "domain": {"bandwidth": 100}},
        accelerator={"bfloat16_flops": 1e15, "memory_bandwidth": 1e3, "memory_share": 0.5},
        model={"layers": 3, "d_ff": None, "moe": moe, "tied_embeddings": tied},
        train={"micro_batches": 8},
    )
    found = estimate(spec, two_nodes(spec))
    dense, experts, _ = found.computing
    forward_and_backward, micro_batches, layers, width = 3, 2, 3, 2  # width: bytes of a value in bfloat16
    # Four projections of attention; head and merge with their biases; a score of each expert; and, tied or not, the
    # output's matrix.
    read = layers * (4 * 32 * 32 + 2 * (32 * 32 + 32) + 4 * 16) + 300 * 32
    assert dense == (
        "all but experts",
        pytest.approx(forward_and_backward * micro_batches * width * read / 500),
        "memory bandwidth",
    )
    # Three products between 16 and 24 values, of 2 x 16 tokens' 2 sub-tokens, twice routed, by the one expert here.
    values = 3 * (128 * (16 + 24) + 16 * 24)
    assert experts == (
        "experts",
        pytest.approx(forward_and_backward * micro_batches * layers * width * values / 500),
        "memory bandwidth",
    )
    # Half of what a rank has goes to the other node: of 2 x 16 tokens' rows, twice routed, 32 values each, there and
    # back in forward and backward; and an int64 to each of the two ranks there, how many rows come.
    away = 4 * 32 * 2 * 32 * width / 2 + 2 * 8
    assert found.exchanging[0] == (
        "rows to experts and back",
        pytest.approx(micro_batches * layers * away / 100),
        "links between nodes",
    )


@pytest.mark.parametrize(("ep", "experts_passes"), [(1, 4), (4, 3 + 2 / 3)])
def test_recomputing_costs_another_forward_of_what_is_in_blocks_alone(ep, experts_passes):
    """Experts that are spread over ranks recompute only their hidden rows: two of their three products."""
    accelerator = {"bfloat16_flops": 1e6, "flops_share": 1, "memory_bandwidth": 1e15}
    model = {**tiny_spec().model.model_dump(), "moe": {"experts": 4, "d_expert": 24, "d_shared": 16, "every": 2}}
    cluster = {"workers": 4, "ep": ep, "accelerator": accelerator}
    train = {"precision": "bfloat16", "recompute": True}
    spec = tiny_spec(cluster=cluster, model=model, train=train)
    found = {time.name: time.seconds for time in estimate(spec, on_one_node(4, ep)).computing}
    macs = {part.name: part.layers * part.macs for part in parts(spec.model)}
    inside = ("projections", "router", "shared expert")
    once = macs["output"] + (sum(macs[name] for name in inside) if ep > 1 else 0)
    routed, tokens = macs["experts"], 2 * 16
    forward = flops_per_token(spec.model, 16).forward - 2 * routed
    assert found["all but experts"] == pytest.approx(tokens * (4 * forward - 2 * once) / 1e6)
    assert found["experts"] == pytest.approx(tokens * experts_passes * 2 * routed / 1e6)


def test_a_step_is_between_all_at_once_and_all_in_turn():
    spec = spec_of()
    found = estimate(spec, two_nodes(spec))
    parts_ = [time.seconds for time in [*found.computing, *found.exchanging]]
    assert found.in_turn == pytest.approx(sum(parts_))
    assert max(parts_) <= found.overlapped <= found.in_turn
    assert found.longest.seconds == max(parts_)
    peak = 3 * flops_per_token(spec.model, 16).forward * 32 / 989e12
    assert found.flops == pytest.approx(peak)
    alone = tiny_spec()
    layout = laid_out(packed(on_paper(1, 1, 1), 1, 1, 1), 1)
    assert estimate(alone, layout).exchanging == []
    assert estimate(alone, layout).in_turn == estimate(alone, layout).overlapped
