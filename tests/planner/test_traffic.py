"""Planned traffic against the collectives that a real step of several processes issues."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mhmoe_ray.planner.memory import whole_weights
from mhmoe_ray.planner.placement import Node, laid_out
from mhmoe_ray.planner.traffic import dispatches, exchanges
from tests.ranks import run_ranks
from tests.specs import tiny_spec
from tests.train.jobs import batches, trainer_of


class Collectives(TorchDispatchMode):
    """Mode that counts the calls and the bytes that this rank brings, by collective."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if "c10d" in name:
            tensors = args[1] if "_base" in name else args[0]  # the former have their output first
            brought = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            kind = "alltoall" if "alltoall" in name or "all_to_all" in name else name.split("::")[1].strip("_")
            self.calls[kind] += 1
            self.bytes[kind] += sum(t.nbytes for t in brought)
        return function(*args, **(kwargs or {}))


def seen_in_a_step(spec, nodes=None):
    trainer = trainer_of(spec, nodes)
    with Collectives() as seen:
        sums = trainer.accumulate(batches(spec, 0, trainer))
    return {"calls": dict(seen.calls), "bytes": dict(seen.bytes), "sent": sums.sent, "least": sums.least_sent}


@pytest.mark.parametrize(
    ("workers", "ep", "train"),
    [
        (2, 2, {"precision": "bfloat16"}),
        (2, 1, {}),
        pytest.param(4, 2, {}, marks=pytest.mark.slow),
    ],
)
def test_exchanges_are_those_of_a_real_step(workers, ep, train):
    spec = tiny_spec(cluster={"workers": workers, "ep": ep}, train=train)
    expected = exchanges(spec)
    to_all = [e for e in expected if not e.name.startswith("gradients of all") and e.name != "gradients of experts"]
    reduced = [e for e in expected if e not in to_all]
    ranks = run_ranks(workers, seen_in_a_step, spec)
    for found in ranks:
        assert found["calls"].get("alltoall", 0) == sum(e.times for e in to_all)
        assert found["bytes"]["allreduce"] == sum(e.payload for e in reduced)
        assert found["bytes"].get("alltoall", 0) == sum(found["sent"])
        assert found["sent"].counts == sum(e.times * e.payload for e in to_all if e.name == "counts per expert")
    rows = sum(found["sent"].rows for found in ranks)
    assert rows == sum(found["least"] for found in ranks)
    # Routing is near uniform at the start.
    assert rows == pytest.approx(workers * sum(e.times * e.payload for e in to_all if "counts" not in e.name), rel=0.1)


@pytest.mark.parametrize("top_k", [1, 3])
def test_exchanges_of_hierarchical_dispatch_are_those_of_a_real_step(top_k):
    moe = {"heads": 2, "experts": 8, "top_k": top_k, "d_expert": 24}
    spec = tiny_spec(
        cluster={"workers": 4, "ep": 4, "dispatch": "hierarchical"},
        model={**tiny_spec().model.model_dump(), "moe": moe},
        train={"micro_batch_size": 8},
    )
    nodes = [Node(name, 2, 2) for name in "aabb"]
    expected = dispatches(spec, laid_out(nodes, 4))
    ranks = [found["sent"] for found in run_ranks(4, seen_in_a_step, spec, [node.name for node in nodes])]

    def mean(of):
        return 4 * sum(e.times * of(e) for e in expected)

    assert sum(sent.counts for sent in ranks) == mean(lambda e: e.sent if "counts" in e.name else 0)
    # Routing is near uniform at the start.
    rows = mean(lambda e: 0 if "counts" in e.name else e.sent)
    away = mean(lambda e: 0 if "counts" in e.name else e.links.domain.mean)
    assert sum(sent.rows for sent in ranks) == pytest.approx(rows, rel=0.1)
    assert sum(sent.between_nodes for sent in ranks) == pytest.approx(away, rel=0.1)


def test_what_leaves_a_rank_and_how_often():
    assert exchanges(tiny_spec()) == []
    spec = tiny_spec(cluster={"workers": 4, "ep": 2})
    counts, *rows, shared, experts = exchanges(spec)
    tokens, k, d = 2 * 16, 2, 32
    assert len(rows) == 4
    for exchange in rows:  # one layer, one micro-batch on each of four workers
        assert (exchange.payload, exchange.ranks, exchange.times) == (tokens * k * d * 4 // 2, 2, 1)
        assert exchange.sent == exchange.payload
    assert (counts.payload, counts.sent) == (2 * 8, 2 * 8)
    assert (shared.ranks, shared.sent) == (4, shared.payload * 3 // 2)
    assert (experts.ranks, experts.sent) == (2, experts.payload)
    more = exchanges(tiny_spec(cluster={"workers": 4, "ep": 2}, train={"micro_batches": 12}))
    assert [e.times for e in more] == [3, 3, 3, 3, 3, 1, 1]
    # h changes neither payload nor count: h * N rows of width d / h.
    moe = {"heads": 4, "experts": 4, "top_k": 2, "d_expert": 24}
    assert (
        exchanges(tiny_spec(cluster={"workers": 4, "ep": 2}, model={**spec.model.model_dump(), "moe": moe}))[1]
        == rows[0]
    )


@pytest.mark.parametrize("shard_experts", [False, True])
def test_slices_are_gathered_and_reduced_as_in_a_real_step(shard_experts):
    spec = tiny_spec(cluster={"workers": 2, "ep": 1, "strategy": "fsdp", "shard_experts": shard_experts})
    expected = exchanges(spec)
    gathered = sum(e.payload * e.times for e in expected if e.name.startswith("weights"))
    scattered = sum(e.payload * e.times for e in expected if e.name.startswith("gradients of all"))
    experts = sum(e.payload * e.times for e in expected if e.name == "gradients of experts")
    for found in run_ranks(2, seen_in_a_step, spec):
        # A block's tensors go together, each padded to a whole number of rows.
        assert found["bytes"]["allgather_base"] == pytest.approx(gathered, rel=0.01)
        whole = found["bytes"].get("allreduce", 0), found["bytes"]["reduce_scatter_base"]
        assert whole == ((0, scattered + experts) if shard_experts else (experts, scattered))


def seen_of_zero(spec):
    """Return the bytes sent in a second step while it accumulates and while it updates, and the parameters that were
    whole before the last norm.

    DeepSpeed learns in the first step in which order weights are used. The parameters are counted in bytes.
    """
    trainer = trainer_of(spec)
    parameters = list(trainer.model.parameters())
    whole = []
    trainer.model.norm.register_forward_pre_hook(lambda *_: whole.append(sum(p.nbytes for p in parameters)))
    for step in range(2):
        with Collectives() as accumulating:
            sums = trainer.accumulate(batches(spec, step, trainer))
        with Collectives() as updating:
            trainer.update(sums)
    return dict(accumulating.bytes), dict(updating.bytes), whole[-1]


def in_all(spec, name):
    """Return the bytes that a rank brings in a step to the planned exchanges whose names start with `name`."""
    return sum(e.payload * e.times for e in exchanges(spec) if e.name.startswith(name))


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_zero_sends_slices_of_gradients_to_their_ranks_alone(strategy):
    pytest.importorskip("deepspeed")
    spec = tiny_spec(cluster={"workers": 2, "strategy": strategy})
    for accumulating, updating, _ in run_ranks(2, seen_of_zero, spec):
        assert "allreduce" not in accumulating
        assert accumulating["reduce"] == pytest.approx(in_all(spec, "gradients"), rel=0.01)
        assert updating["allgather_base"] == pytest.approx(in_all(spec, "weights"), rel=0.01)


def test_zero_3_gathers_weights_for_each_pass_and_has_two_blocks_whole():
    pytest.importorskip("deepspeed")
    moe = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 128}
    model = {"vocab_size": 300, "d_model": 192, "layers": 6, "attention_heads": 4, "d_ff": 512, "moe": moe}
    spec = tiny_spec(model=model, cluster={"workers": 2, "strategy": "zero3"})
    held, micro_batches = whole_weights(spec), spec.train.micro_batches // 2
    for accumulating, _, whole in run_ranks(2, seen_of_zero, spec):
        assert whole == pytest.approx(held, rel=0.05)
        assert accumulating["reduce_scatter_base"] == pytest.approx(in_all(spec, "gradients"), rel=0.01)
        kept = micro_batches * held // 2  # from forward to backward, in slices
        gathered = accumulating["allgather_base"]
        assert gathered == pytest.approx(in_all(spec, "weights") - kept, rel=0.05)
        assert gathered < in_all(spec, "weights")


def test_strategies_send_what_they_save_in_memory_as_bytes():
    def sent(strategy, **cluster):
        spec = tiny_spec(cluster={"workers": 4, "strategy": strategy, **cluster}, train={"micro_batches": 8})
        return sum(e.sent_per_step for e in exchanges(spec))

    assert sent("ddp") == sent("zero1")  # a reduction to slices and a gathering are what an all-reduce is
    assert sent("zero1") < sent("zero2") < sent("zero3")
    assert sent("fsdp", shard_experts=True) == 2.5 * sent("ddp")  # 2 micro-batches: 4 gatherings and a reduction for 2
