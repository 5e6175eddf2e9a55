"""Test of planned memory with the keys that the planner chooses, against what real ranks over gloo hold."""

import pytest

from mhmoe_ray.planner.adapt import update_keys
from mhmoe_ray.planner.memory import compute_memory, gathered_weight_bytes, unsharded_gradient_bytes
from mhmoe_ray.planner.search import MEMORY_SHARE, choose_on_paper
from mhmoe_ray.planner.sizes import block_sizes, compute_sizes
from tests.planner.rank_memory import loss_bytes_of_rank, state_bytes_of_rank, unsharded_bytes_of_rank
from tests.support.ranks import run_ranks
from tests.support.specs import tiny_spec

MOE = {"heads": 2, "experts": 8, "top_k": 2, "d_expert": 192, "every": 1, "kernel": "grouped"}
MODEL = {"vocab_size": 2000, "d_model": 128, "layers": 4, "attention_heads": 4, "d_ff": None, "moe": MOE}
TRAIN = {"micro_batches": 1, "micro_batch_size": 32, "compile": False}
NARROW = {"train": {"precision": "bfloat16"}}
WITHOUT_EP = {**NARROW, "cluster": {"ep": 1}}
HYBRID = {
    "train": {"micro_batches": 4, "micro_batch_size": 8, "precision": "bfloat16"},
    "cluster": {"workers": 4, "ep": 1, "strategy": "fsdp", "shard_experts": True, "shard_group": 2},
}
CASES = {
    2: [(400, {}), (80, {}), (25, {}), (40, NARROW), (50, WITHOUT_EP)],
    4: [(50, {}), (30, {}), (18, {}), (30, WITHOUT_EP), (45, HYBRID)],
}
"""Megabytes of memory of a GPU and changes of the spec, by number of GPUs."""


def chosen_spec(workers, megabytes, changes):
    """Return a spec with the keys that are chosen for so many GPUs, for ranks on CPUs."""
    cluster = {"gpus_per_worker": 1, "accelerator": {"memory": megabytes * 1e6}, **changes.get("cluster", {})}
    train = {**TRAIN, **changes.get("train", {})}
    spec, _ = choose_on_paper(tiny_spec(model=MODEL, data={"seq_len": 64}, train=train, cluster=cluster), 1, workers)
    assert compute_memory(spec).total <= MEMORY_SHARE * megabytes * 1e6
    return update_keys(spec, {"cluster.gpus_per_worker": 0})


SPECS = {workers: [chosen_spec(workers, *case) for case in cases] for workers, cases in CASES.items()}


def bytes_of_rank(specs):
    """Return the bytes of this rank's state, of its micro-batch and of fsdp's gathers, for each spec."""
    return [
        (
            state_bytes_of_rank(spec),
            loss_bytes_of_rank(spec),
            unsharded_bytes_of_rank(spec) if spec.cluster.strategy == "fsdp" else (0, []),
        )
        for spec in specs
    ]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def measured_ranks(request):
    """The specs for a number of ranks, each with what its ranks hold."""
    results = run_ranks(request.param, bytes_of_rank, SPECS[request.param])
    return list(zip(SPECS[request.param], zip(*results, strict=True), strict=True))


def test_choices_have_all_values_of_the_keys():
    specs = [spec for specs in SPECS.values() for spec in specs]
    assert {spec.train.recompute for spec in specs} >= {"none", "experts", "block", "exchange"}
    assert {spec.train.loss_chunk_rows is None for spec in specs} == {False, True}
    assert len({spec.train.micro_batches // spec.cluster.workers.max for spec in specs}) >= 3
    assert {(spec.cluster.strategy, spec.cluster.shard_experts) for spec in specs} == {
        ("ddp", False),
        ("fsdp", False),
        ("fsdp", True),
    }
    assert {spec.cluster.reduce_after for spec in specs} == {"step", "micro_batch"}
    assert {spec.cluster.ep for spec in specs} == {1, 2, 4}


def layer_memory(spec, recompute):
    """Return the planned memory that a layer adds to the others."""
    spec = update_keys(spec, {"train.recompute": recompute})
    memory = compute_memory(spec)
    fewer_layers = compute_memory(update_keys(spec, {"model.layers": spec.model.layers - 1}))
    return memory._make(larger - smaller for larger, smaller in zip(memory, fewer_layers, strict=True))


def test_planned_memory_is_what_ranks_hold(measured_ranks):
    """The mean over ranks is compared, because routing is not uniform."""
    for spec, ranks in measured_ranks:
        memory, count = compute_memory(spec), len(ranks)
        states, micro_batches, gathers = zip(*ranks, strict=True)
        state = [sum(parts) / count for parts in zip(*states, strict=True)]
        loss_bytes, held_bytes = (sum(parts) / count for parts in zip(*micro_batches, strict=True))
        case = f"{spec.cluster} {spec.train}"
        assert (memory.weights, memory.gradients, memory.moments) == pytest.approx(tuple(state), rel=0.003), case
        outside = block = last_gather = 0
        if spec.cluster.strategy == "fsdp":
            outside, experts = 4 * block_sizes(spec.model).outside, 4 * compute_sizes(spec.model).expert_parameters
            block = gathers[0][0] - outside
            last_gather = experts // spec.model.layers if spec.cluster.shard_experts else block
            # A CPU does not gather the next block in advance.
            assert gathered_weight_bytes(spec) == outside + 2 * block, case
            accumulated = gathers[0][1][0]
            assert gathers[0][1][-1] == 0, case
            if accumulated:
                shards = memory.gradients - (0 if spec.cluster.shard_experts else experts // spec.cluster.ep)
                assert unsharded_gradient_bytes(spec) == accumulated - shards, case
            else:
                assert unsharded_gradient_bytes(spec) == outside + block, case
        # The plan has all that the recomputed block keeps, which exists only in the backward.
        recomputed = 0
        if spec.train.recompute in ("block", "exchange"):
            plain_layer, layer = layer_memory(spec, "none"), layer_memory(spec, spec.train.recompute)
            recomputed = plain_layer.activations + plain_layer.copies - layer.copies
        planned_bytes = memory.activations + memory.copies - recomputed + outside
        if spec.train.loss_chunk_rows is None:
            assert planned_bytes == pytest.approx(held_bytes, rel=0.03), case
        else:
            # FSDP frees the buffer of its last gather when the forward ends, which includes the loss.
            assert planned_bytes + memory.logits + last_gather == pytest.approx(loss_bytes, rel=0.03), case
