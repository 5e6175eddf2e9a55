"""Tests of planned traffic, against the collectives of a real step of several processes."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mhmoe_ray.planner.memory import gathered_weight_bytes
from mhmoe_ray.planner.placement import Node, build_layout
from mhmoe_ray.planner.sizes import block_sizes, compute_sizes
from mhmoe_ray.planner.traffic import all_exchanges, dispatch_exchanges
from tests.support.ranks import run_ranks
from tests.support.specs import tiny_spec
from tests.train.jobs import build_trainer, rank_batches


class Collectives(TorchDispatchMode):
    """Mode that counts the calls of each collective and the bytes that this rank contributes."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if "c10d" in name:
            # If the name of an operator has _base in it, the first argument is the output, and the second is what the
            # rank sends.
            tensors = args[1] if "_base" in name else args[0]
            brought = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            kind = "alltoall" if "alltoall" in name or "all_to_all" in name else name.split("::")[1].strip("_")
            self.calls[kind] += 1
            self.bytes[kind] += sum(t.nbytes for t in brought)
        return function(*args, **(kwargs or {}))


def collectives_of_step(spec, nodes=None):
    """Return the calls and bytes of this rank's collectives in a step without its update, by kind, and the trainer's
    counts of bytes sent and of the least bytes to send."""
    trainer = build_trainer(spec, nodes)
    with Collectives() as collectives:
        sums = trainer.accumulate(rank_batches(spec, 0, trainer))
    return {
        "calls": dict(collectives.calls),
        "bytes": dict(collectives.bytes),
        "sent": sums.sent_bytes,
        "least": sums.least_bytes,
    }


WIDE = {"heads": 3, "d_sub_token": 20, "experts": 4, "top_k": 2, "d_expert": 24}
"""Experts whose h sub-tokens together are wider than the token."""


@pytest.mark.parametrize(
    ("workers", "ep", "train", "moe"),
    [
        (2, 2, {"precision": "bfloat16"}, {}),
        (2, 2, {}, WIDE),
        (2, 1, {}, {}),
        (2, 2, {"recompute": "block"}, {}),
        pytest.param(4, 2, {}, {}, marks=pytest.mark.slow),
    ],
)
def test_exchanges_are_those_of_a_real_step(workers, ep, train, moe):
    base = tiny_spec().model.model_dump()
    model = {**base, "moe": {**base["moe"], **moe}}
    spec = tiny_spec(cluster={"workers": workers, "ep": ep}, train=train, model=model)
    expected = all_exchanges(spec)
    all_to_alls = [
        e for e in expected if not e.name.startswith("gradients of all") and e.name != "gradients of experts"
    ]
    all_reduces = [e for e in expected if e not in all_to_alls]
    ranks = run_ranks(workers, collectives_of_step, spec)
    for results in ranks:
        assert results["calls"].get("alltoall", 0) == sum(e.times for e in all_to_alls)
        assert results["bytes"]["allreduce"] == sum(e.payload for e in all_reduces)
        assert results["bytes"].get("alltoall", 0) == sum(results["sent"])
        assert results["sent"].counts == sum(e.times * e.payload for e in all_to_alls if e.name == "counts per expert")
    rows = sum(results["sent"].rows for results in ranks)
    assert rows == sum(results["least"] for results in ranks)
    # At the start of a training, routing is nearly uniform, so the rows are near the plan, which takes it as uniform.
    assert rows == pytest.approx(
        workers * sum(e.times * e.payload for e in all_to_alls if "counts" not in e.name), rel=0.1
    )


@pytest.mark.parametrize(("top_k", "width"), [(1, None), (3, 40)])
def test_exchanges_of_hierarchical_dispatch_are_those_of_a_real_step(top_k, width):
    moe = {"heads": 2, "experts": 8, "top_k": top_k, "d_expert": 24, "d_sub_token": width}
    spec = tiny_spec(
        cluster={"workers": 4, "ep": 4, "dispatch": "hierarchical"},
        model={**tiny_spec().model.model_dump(), "moe": moe},
        train={"micro_batch_size": 8},
    )
    nodes = [Node(name, 2, 2) for name in "aabb"]
    expected = dispatch_exchanges(spec, build_layout(nodes, 4))
    ranks = [results["sent"] for results in run_ranks(4, collectives_of_step, spec, [node.name for node in nodes])]

    def mean(amount_of):
        return 4 * sum(e.times * amount_of(e) for e in expected)

    assert sum(sent_bytes.counts for sent_bytes in ranks) == mean(lambda e: e.sent_bytes if "counts" in e.name else 0)
    # At the start of a training, routing is nearly uniform, so the rows are near the plan, which takes it as uniform.
    rows = mean(lambda e: 0 if "counts" in e.name else e.sent_bytes)
    remote_rows = mean(lambda e: 0 if "counts" in e.name else e.links.domain.mean)
    assert sum(sent_bytes.rows for sent_bytes in ranks) == pytest.approx(rows, rel=0.1)
    assert sum(sent_bytes.between_nodes for sent_bytes in ranks) == pytest.approx(remote_rows, rel=0.1)


def test_payload_and_number_of_exchanges_follow_from_the_spec():
    assert all_exchanges(tiny_spec()) == []
    spec = tiny_spec(cluster={"workers": 4, "ep": 2})
    counts, *rows, shared, experts = all_exchanges(spec)
    tokens, k, d = 2 * 16, 2, 32
    assert len(rows) == 4
    for exchange in rows:  # one layer, and one micro-batch on each of four workers
        assert (exchange.payload, exchange.ranks, exchange.times) == (tokens * k * d * 4 // 2, 2, 1)
        assert exchange.sent_bytes == exchange.payload
    assert (counts.payload, counts.sent_bytes) == (2 * 8, 2 * 8)
    assert (shared.ranks, shared.sent_bytes) == (4, shared.payload * 3 // 2)
    assert (experts.ranks, experts.sent_bytes) == (2, experts.payload)
    exchanges = all_exchanges(tiny_spec(cluster={"workers": 4, "ep": 2}, train={"micro_batches": 12}))
    assert [e.times for e in exchanges] == [3, 3, 3, 3, 3, 1, 1]
    # By default, the number of heads h changes neither the payload nor the number of exchanges: there are h N rows, but
    # of width d/h.
    moe = {"heads": 4, "experts": 4, "top_k": 2, "d_expert": 24}

    def row_exchange(**options):
        model = {**spec.model.model_dump(), "moe": {**moe, **options}}
        return all_exchanges(tiny_spec(cluster={"workers": 4, "ep": 2}, model=model))[1]

    assert row_exchange() == rows[0]
    assert row_exchange(d_sub_token=32).payload == 4 * rows[0].payload


def test_gates_are_exchanged_on_gpus_and_counts_only_once():
    train = {"precision": "bfloat16", "recompute": "block"}
    spec = tiny_spec(cluster={"workers": 4, "ep": 2, "gpus_per_worker": 1}, train=train)
    counts, *rows = dispatch_exchanges(spec)
    # Of 32 tokens of 32 values in two heads, each with two choices, half of the routes are to the other rank.
    assert [e.payload for e in rows] == [32 * (2 * 32 + 2 * gate_bytes) for gate_bytes in (4, 0, 0, 4)]
    assert [e.times for e in (counts, *rows)] == [1, 2, 2, 1, 1]


@pytest.mark.parametrize("shard_experts", [False, True])
def test_groups_of_hybrid_sharding_gather_by_themselves_and_sum_their_shards(shard_experts):
    cluster = {"workers": 4, "strategy": "fsdp", "shard_experts": shard_experts, "shard_group": 2}
    spec = tiny_spec(cluster=cluster)
    expected = all_exchanges(spec)
    gathered = sum(e.payload * e.times for e in expected if e.name.startswith("weights"))
    between = sum(e.payload * e.times for e in expected if e.name.endswith("between groups"))
    experts = sum(e.payload * e.times for e in expected if e.name == "gradients of experts")
    assert {e.ranks for e in expected if e.name.startswith("weights") or e.name.endswith("between groups")} == {2}
    for results in run_ranks(4, collectives_of_step, spec):
        assert results["bytes"]["allgather_base"] == pytest.approx(gathered, rel=0.01)
        expected_sum = between + (0 if shard_experts else experts)
        assert results["bytes"]["allreduce"] == pytest.approx(expected_sum, rel=0.01)


@pytest.mark.parametrize(
    ("shard_experts", "gathers", "sums", "reduce_after"),
    [
        (False, "float32", "float32", "step"),
        (True, "float32", "float32", "step"),
        (True, "float32", "float32", "micro_batch"),
        (True, "bfloat16", "float32", "step"),
        (True, "bfloat16", "bfloat16", "step"),
    ],
)
def test_shards_are_gathered_and_reduced_as_in_a_real_step(shard_experts, gathers, sums, reduce_after):
    cluster = {"workers": 2, "ep": 1, "strategy": "fsdp", "shard_experts": shard_experts}
    cluster |= {"gather_precision": gathers, "reduce_precision": sums, "reduce_after": reduce_after}
    spec = tiny_spec(cluster=cluster, train={"precision": gathers})
    expected = all_exchanges(spec)
    gathered = sum(e.payload * e.times for e in expected if e.name.startswith("weights"))
    scattered = sum(e.payload * e.times for e in expected if e.name.startswith("gradients of all"))
    experts = sum(e.payload * e.times for e in expected if e.name == "gradients of experts")
    for results in run_ranks(2, collectives_of_step, spec):
        # FSDP gathers the tensors of a block together, and each is padded to a whole number of rows, so the bytes
        # differ a little.
        assert results["bytes"]["allgather_base"] == pytest.approx(gathered, rel=0.01)
        reduced_bytes = results["bytes"].get("allreduce", 0), results["bytes"]["reduce_scatter_base"]
        assert reduced_bytes == ((0, scattered + experts) if shard_experts else (experts, scattered))


def collectives_of_zero(spec):
    """Return three results of a second step: bytes of collectives by kind in its forward and backward passes, the same
    in its update, and the bytes of the parameters that are gathered just before the last norm.

    It is the second step because DeepSpeed learns the order of the weights in the first one.
    """
    trainer = build_trainer(spec)
    parameters = list(trainer.model.parameters())
    gathered_bytes = []
    trainer.model.norm.register_forward_pre_hook(lambda *_: gathered_bytes.append(sum(p.nbytes for p in parameters)))
    for step in range(2):
        with Collectives() as accumulation:
            sums = trainer.accumulate(rank_batches(spec, step, trainer))
        with Collectives() as update:
            trainer.update(sums)
    return dict(accumulation.bytes), dict(update.bytes), gathered_bytes[-1]


def planned_bytes(spec, name):
    """Return the bytes that a rank contributes in a step to the planned exchanges whose names start with `name`."""
    return sum(e.payload * e.times for e in all_exchanges(spec) if e.name.startswith(name))


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_zero_sends_shards_of_gradients_to_their_ranks_only(strategy):
    pytest.importorskip("deepspeed")
    spec = tiny_spec(cluster={"workers": 2, "strategy": strategy})
    for accumulated_bytes, updated_bytes, _ in run_ranks(2, collectives_of_zero, spec):
        assert "allreduce" not in accumulated_bytes
        assert accumulated_bytes["reduce"] == pytest.approx(planned_bytes(spec, "gradients"), rel=0.01)
        assert updated_bytes["allgather_base"] == pytest.approx(planned_bytes(spec, "weights"), rel=0.01)


def test_zero_3_gathers_weights_for_each_pass_and_two_blocks_at_a_time():
    pytest.importorskip("deepspeed")
    moe = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 128}
    model = {"vocab_size": 300, "d_model": 192, "layers": 6, "attention_heads": 4, "d_ff": 512, "moe": moe}
    spec = tiny_spec(model=model, cluster={"workers": 2, "strategy": "zero3"})
    expected, micro_batches = gathered_weight_bytes(spec), spec.train.micro_batches // 2
    for accumulated_bytes, _, gathered_bytes in run_ranks(2, collectives_of_zero, spec):
        assert gathered_bytes == pytest.approx(expected, rel=0.05)
        assert accumulated_bytes["reduce_scatter_base"] == pytest.approx(planned_bytes(spec, "gradients"), rel=0.01)
        # Some weights stay gathered from the forward to the backward pass, so neither of the two ranks sends its half
        # of them again.
        kept_bytes = micro_batches * expected // 2
        all_gathers = accumulated_bytes["allgather_base"]
        assert all_gathers == pytest.approx(planned_bytes(spec, "weights") - kept_bytes, rel=0.05)
        assert all_gathers < planned_bytes(spec, "weights")


def test_strategies_with_less_memory_send_more_bytes():
    def sent_bytes(strategy, **cluster):
        spec = tiny_spec(cluster={"workers": 4, "strategy": strategy, **cluster}, train={"micro_batches": 8})
        return sum(e.sent_per_step for e in all_exchanges(spec))

    # An all-reduce is a reduce-scatter and an all-gather, so both strategies send the same bytes.
    assert sent_bytes("ddp") == sent_bytes("zero1")
    assert sent_bytes("zero1") < sent_bytes("zero2") < sent_bytes("zero3")
    # Each of two micro-batches gathers the weights of blocks twice and all others once, and the gradients are reduced
    # once. The all-reduce of `ddp` is two such exchanges.
    spec = tiny_spec(cluster={"workers": 4})
    outside_share = block_sizes(spec.model).outside / compute_sizes(spec.model).parameters
    ratio = sent_bytes("fsdp", shard_experts=True) / sent_bytes("ddp")
    assert ratio == pytest.approx(2.5 - outside_share)
    # With two reductions there is one exchange more.
    reduced = sent_bytes("fsdp", shard_experts=True, reduce_after="micro_batch") / sent_bytes("ddp")
    assert reduced == pytest.approx(ratio + 0.5)
