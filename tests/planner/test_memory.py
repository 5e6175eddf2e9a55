"""Tests of planned memory, against the bytes that autograd saves in a real step and that torch's optimizer holds."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mhmoe_kernels.choice import TRITON_KERNELS
from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.loss import Targets
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.model.router import SCORES_BY_ROUTER
from mhmoe_ray.model.trunk import routing_loss
from mhmoe_ray.planner.kernels import assumed_kernel, may_use_cpp
from mhmoe_ray.planner.memory import (
    checkpoint_copy_bytes,
    compute_memory,
    gathered_weight_bytes,
    unsharded_gradient_bytes,
)
from mhmoe_ray.planner.sizes import block_sizes, compute_sizes, float32_sizes, gathered_bytes
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.objectives import MicroBatch
from mhmoe_ray.train.step import Trainer
from tests.planner.rank_memory import state_bytes_of_rank, unsharded_bytes_of_rank
from tests.support.cpp_kernel import MUST_COMPILE
from tests.support.decoders import BACKBONES
from tests.support.encoders import SMEAR, encoder_batch, encoder_spec
from tests.support.ranks import run_ranks
from tests.support.runs import new_run
from tests.support.specs import tiny_spec
from tests.support.tensors import SavedTensors
from tests.train.jobs import build_trainer, micro_batches

TRUNK = {"vocab_size": 500, "d_model": 96, "layers": 3, "attention_heads": 4, "d_ff": 200}
KINDS = {
    **{name: {"backbone": name} for name in BACKBONES},
    "grouped-queries": {"kv_heads": 2, "tied_embeddings": False},
    "dropout": {"backbone": "subln", "dropout": 0.1},
    "masks": {"document_masks": True},
    "head norms": {"qk_norm": "head", "d_head": 32, "kv_heads": 2, "attention_bias": "qkv"},
    "norms of all heads": {"qk_norm": "all", "attention_bias": "all"},
}
EXPERTS = {
    "dense": None,
    "plain": {"heads": 1, "experts": 5, "top_k": 1, "d_expert": 100, "d_shared": 60, "every": 1, "kernel": "grouped"},
    "multi-head": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 40, "kernel": "grouped"},
    "recomputed": {"heads": 4, "experts": 4, "top_k": 2, "d_expert": 200, "kernel": "grouped"},
    "kept": {"heads": 4, "experts": 4, "top_k": 2, "d_expert": 200, "recompute": 0, "kernel": "grouped"},
    "not kept": {"heads": 4, "experts": 4, "top_k": 2, "d_expert": 200, "recompute": 1, "kernel": "grouped"},
    "projected": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 40, "projection_layers": 3, "kernel": "grouped"},
    "jitter": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 40, "jitter": 0.1, "kernel": "grouped"},
    "plain jitter": {"heads": 1, "experts": 4, "top_k": 2, "d_expert": 40, "jitter": 0.1, "kernel": "grouped"},
    "wide sub-tokens": {
        "heads": 2,
        "experts": 4,
        "top_k": 2,
        "d_expert": 40,
        "d_sub_token": 96,
        "projection_layers": 2,
        "jitter": 0.1,
        "kernel": "grouped",
    },
    "static": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 40, "capacity_factor": 1.0, "kernel": "capacity"},
    **{
        f"router {name}": {
            "heads": 4,
            "experts": 16,
            "top_k": 3,
            "d_expert": 80,
            "router": name,
            "kernel": "grouped",
        }
        for name in SCORES_BY_ROUTER
    },
    "sigmoid": {
        "heads": 4,
        "experts": 16,
        "top_k": 3,
        "d_expert": 80,
        "scoring": "sigmoid",
        "normalize_gates": True,
        "gate_scale": 2.5,
        "groups": 4,
        "top_groups": 2,
        "kernel": "grouped",
    },
}


def spec_of(kind, experts, precision="float32") -> RunSpec:
    """Return the spec of a model; `kind` is a key of `KINDS`, and `experts` a key of `EXPERTS`."""
    train = {"micro_batch_size": 2, "precision": precision}
    model = {**TRUNK, **KINDS[kind], "moe": EXPERTS[experts]}
    if experts == "plain":
        model["d_ff"] = None
    # The sequences of `masks` are so long that a missing mask would exceed the tolerance of the test.
    seq_len = 192 if kind == "masks" else 64
    return tiny_spec(model=model, data={"seq_len": seq_len}, train=train)


def autograd_bytes(spec: RunSpec) -> int:
    """Return the bytes that autograd saves, in addition to the weights, in the forward pass of a micro-batch."""
    model = Decoder(spec.model)
    init_weights(model, 0)
    model.loss_chunk_rows = spec.train.loss_chunk_rows
    saved_tensors = SavedTensors(model)
    token_BT = torch.randint(spec.model.vocab_size, (spec.train.micro_batch_size, spec.data.seq_len + 1))
    bfloat16 = spec.train.precision == "bfloat16"
    with torch.autograd.graph.saved_tensors_hooks(saved_tensors, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            document_BT = (token_BT[:, :-1] < 20).cumsum(1) if spec.model.document_masks else None
            # A single value takes the place of the mask of the targets, which is part of the batch.
            targets = Targets(token_BT[:, 1:], torch.ones(1, 1, dtype=torch.bool).expand_as(token_BT[:, 1:]))
            output = model(token_BT[:, :-1], noise=Noise(0, 0), document_BT=document_BT, targets=targets)
        loss = output.loss.sum
        if spec.model.moe:
            loss = loss + routing_loss(spec.model, output.routing)
    assert loss.requires_grad
    return saved_tensors.bytes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("kind", KINDS)
def test_planned_activations_equal_the_bytes_that_autograd_saves(kind, experts, precision):
    spec = spec_of(kind, experts, precision)
    memory = compute_memory(spec)
    assert memory.activations + memory.copies == pytest.approx(autograd_bytes(spec), rel=0.01)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "experts"),
    [("dropout", "multi-head"), *(("llama", name) for name in EXPERTS if name not in ("dense", "static"))],
)
@pytest.mark.parametrize("kernel", TRITON_KERNELS)
def test_planned_activations_of_gpu_kernels_equal_those_of_fake_tensors(kernel, kind, experts, precision):
    if kernel == "grouped_mm" and kind == "dropout":
        pytest.skip("grouped_mm computes no experts with biases")
    spec = spec_of(kind, experts, precision)
    moe = spec.model.moe
    keys = {"kernel": kernel, "recompute": None if kernel == "triton" else moe.recompute}
    # grouped_mm takes hidden widths that are multiples of 8.
    keys["d_expert"] = 40 if experts == "plain" else moe.d_expert
    spec = spec.model_copy(update={"model": spec.model.with_moe(moe.model_copy(update=keys))})
    with FakeTensorMode():
        saved_bytes = autograd_bytes(spec)
    memory = compute_memory(spec)
    assert memory.activations + memory.copies == pytest.approx(saved_bytes, rel=0.01)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "subln", "grouped-queries"])
def test_planned_bytes_of_a_chunked_loss_equal_what_it_keeps(kind, precision):
    """The gradients of the output layer and of its input take the place of the input and the log-probabilities."""
    spec = spec_of(kind, "multi-head", precision)
    chunked = spec.model_copy(update={"train": spec.train.model_copy(update={"loss_chunk_rows": 16})})
    memory, chunked_memory = compute_memory(spec), compute_memory(chunked)
    weight_bytes = 4 * spec.model.vocab_size * spec.model.d_model
    saved_bytes = autograd_bytes(chunked) - weight_bytes
    assert chunked_memory.activations + chunked_memory.copies == pytest.approx(saved_bytes, rel=0.01)
    assert chunked_memory.activations < memory.activations
    assert chunked_memory.logits < memory.logits


@st.composite
def wide_experts(draw) -> dict[str, object]:
    """Draw experts whose sub-tokens have any width, with options that decide what the layer keeps."""
    kernel = draw(st.sampled_from(["grouped", "capacity"]))
    return {
        "heads": draw(st.integers(1, 5)),
        "d_sub_token": draw(st.integers(1, 130)),
        "experts": 4,
        "top_k": draw(st.integers(1, 3)),
        "d_expert": draw(st.sampled_from([20, 100])),
        "head_projection": True,
        "merge_projection": True,
        "projection_layers": draw(st.integers(1, 3)),
        "router": draw(st.sampled_from(list(SCORES_BY_ROUTER))),
        "jitter": draw(st.sampled_from([0.0, 0.1])),
        "d_shared": draw(st.sampled_from([0, 40])),
        "sub_token_residual": draw(st.booleans()),
        "kernel": kernel,
        "capacity_factor": 1.0 if kernel == "capacity" else None,
        # A share between 0 and 1 would be rounded to whole rows of each expert.
        "recompute": draw(st.sampled_from([0.0, 1.0])) if kernel == "grouped" else None,
    }


@settings(max_examples=25)
@given(kind=st.sampled_from(BACKBONES), precision=st.sampled_from(["float32", "bfloat16"]), moe=wide_experts())
def test_planned_bytes_per_token_are_exact_for_any_width_of_sub_tokens(kind, precision, moe):
    """The bytes that more samples add are compared, so that rounded copies of the weights in bfloat16 do not count."""

    def added_bytes(count_bytes):
        model, data = {**TRUNK, **KINDS[kind], "moe": moe}, {"seq_len": 64}
        smaller_bytes, larger_bytes = (
            count_bytes(tiny_spec(model=model, data=data, train={"micro_batch_size": n, "precision": precision}))
            for n in (2, 4)
        )
        return larger_bytes - smaller_bytes

    difference = added_bytes(autograd_bytes) - added_bytes(lambda spec: compute_memory(spec).activations)
    # Only what does not depend on the length of a sequence may differ, and it is less than one byte per token.
    assert 0 <= difference < 2 * 64


@pytest.mark.skipif(not MUST_COMPILE, reason="kernel cpp cannot be compiled here")
def test_planned_activations_of_compiled_experts_equal_saved_bytes():
    spec = spec_of("llama", "multi-head", "bfloat16")
    assert spec.model.moe is not None
    compiled = spec.model.with_moe(spec.model.moe.model_copy(update={"kernel": "cpp"}))
    memory = compute_memory(spec.model_copy(update={"model": compiled}))
    saved_bytes = autograd_bytes(spec.model_copy(update={"model": compiled}))
    assert memory.activations + memory.copies == pytest.approx(saved_bytes, rel=0.01)
    assert memory.activations < compute_memory(spec).activations


@pytest.mark.parametrize("kind", ["llama", "subln"])
def test_planned_activations_of_kernel_reference_equal_saved_bytes(kind):
    """The experts are so wide that `grouped` would save less. The tolerance is larger than that for `grouped`, because
    `reference` also saves the positions of routes."""
    spec = spec_of(kind, "recomputed")
    plain = spec.model.with_moe(spec.model.moe.model_copy(update={"kernel": "reference"}))
    spec = spec.model_copy(update={"model": plain})
    assert compute_memory(spec).activations == pytest.approx(autograd_bytes(spec), rel=0.03)


def encoder_bytes(spec: RunSpec) -> int:
    """Return the bytes that autograd saves, in addition to the weights, in the forward of an encoder's micro-batch."""
    model = build_model(spec.computed_model)
    init_weights(model, 0)
    saved_tensors = SavedTensors(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(saved_tensors, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=spec.train.precision == "bfloat16"),
    ):
        output = model(encoder_batch(spec), noise=Noise(0, 0))
    assert all(loss.sum.requires_grad for loss in output.losses)
    return saved_tensors.bytes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("experts", "d_shared"), [("beside", 0), ("replace", 0), ("replace", 40)])
def test_planned_bytes_of_averaged_experts_equal_what_autograd_saves(precision, dropout, experts, d_shared):
    """The bytes that experts add to a dense encoder are compared, because the plan counts other parts of an encoder
    less exactly."""
    options = {"train__precision": precision, "model__dropout": dropout}
    moe = {**SMEAR, "d_expert": 80, "d_shared": d_shared}
    dense = encoder_spec(model__moe=None, **options)
    spec = encoder_spec(model__moe=moe, model__encoder__experts=experts, **options)
    plans = [compute_memory(s) for s in (spec, dense)]
    planned, planned_dense = (memory.activations + memory.copies for memory in plans)
    # The plan leaves out what the router saves for each sample, and counts biases of averaged experts, which autograd
    # does not save.
    assert planned - planned_dense == pytest.approx(encoder_bytes(spec) - encoder_bytes(dense), rel=0.015)


def test_recomputed_averages_of_experts_are_planned_for_one_layer():
    """Layers keep only their input rows with train.recompute experts, and the plan adds the averaged experts of one
    layer for the backward pass."""
    options = {"model__layers": 4, "model__moe": {**SMEAR, "d_expert": 80}}
    plain, recomputed = (encoder_spec(train__recompute=value, **options) for value in ("none", "experts"))
    merged = 4 * recomputed.samples_per_micro_batch * compute_sizes(recomputed.model).expert_parameters // (3 * 4)
    planned = compute_memory(plain).activations - compute_memory(recomputed).activations
    assert planned + merged == pytest.approx(encoder_bytes(plain) - encoder_bytes(recomputed), rel=0.02)


@pytest.mark.parametrize(
    ("gpus", "precision", "d_model", "kernel"),
    [
        (1, "bfloat16", 512, "grouped_mm"),
        (1, "bfloat16", 514, "grouped_gemm"),  # rows are 257 wide, and grouped_mm takes multiples of 8
        (1, "float32", 512, "grouped_gemm"),
        (0, "bfloat16", 512, "grouped"),
    ],
)
def test_kernel_auto_is_planned_with_the_memory_of_the_assumed_kernel(gpus, precision, d_model, kernel):
    def spec_with(kernel):
        moe = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 400, "kernel": kernel}
        model = {**TRUNK, "attention_heads": 1, "d_model": d_model, "moe": moe}
        return tiny_spec(model=model, cluster={"gpus_per_worker": gpus}, train={"precision": precision})

    assert assumed_kernel(spec_with("auto")) == kernel
    assert compute_memory(spec_with("auto")) == compute_memory(spec_with(kernel))
    assert may_use_cpp(spec_with("auto")) == (not gpus)


def test_assumed_kernel_is_the_named_one_and_none_for_a_dense_model():
    assert assumed_kernel(spec_of("llama", "dense")) is None
    assert assumed_kernel(spec_of("llama", "static")) == "capacity"
    assert not may_use_cpp(spec_of("llama", "multi-head", "bfloat16"))  # this spec names its kernel


@pytest.mark.parametrize(
    ("experts", "moment_precision"), [*((experts, "float32") for experts in EXPERTS), ("multi-head", "bfloat16")]
)
def test_planned_weights_gradients_and_moments_equal_those_of_a_trainer(experts, moment_precision):
    spec = spec_of("llama", experts)
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"moment_precision": moment_precision})})
    trainer = Trainer(spec, build_mesh(spec.cluster, ["here"], "cpu"), torch.device("cpu"))
    sums = trainer.accumulate(micro_batches(spec, 0))
    parameters = list(trainer.model.parameters())
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    trainer.update(sums)
    states = trainer.strategy.optimizer.state.values()
    moments = sum(s[key].nbytes for s in states for key in ("exp_avg", "exp_avg_sq"))
    memory = compute_memory(spec)
    assert memory.weights == sum(p.nbytes for p in parameters)
    assert memory.gradients == gradients
    assert memory.moments == moments


def autograd_bytes_of_rank(spec):
    """Return the bytes that autograd saves on this rank, in addition to its weights, for a micro-batch."""
    trainer = build_trainer(spec)
    saved_tensors = SavedTensors(trainer.model)
    token_BT = torch.randint(300, (spec.train.micro_batch_size, spec.data.seq_len + 1))
    with torch.autograd.graph.saved_tensors_hooks(saved_tensors, lambda t: t):
        output = trainer.forward(MicroBatch(token_BT, torch.ones_like(token_BT[:, 1:]).bool()), Noise(0, 0))
        loss = output.loss.sum + routing_loss(spec.model, output.routing)
    loss.backward()
    return saved_tensors.bytes


def test_activations_of_two_ranks_include_exchanged_rows():
    spec = tiny_spec(cluster={"workers": 2, "ep": 2}, data={"seq_len": 64}, train={"micro_batch_size": 4})
    saved_bytes = run_ranks(2, autograd_bytes_of_rank, spec)
    # Routing is not uniform, so one of the two ranks keeps more than the other. The plan is compared with their mean.
    assert compute_memory(spec).activations == pytest.approx(sum(saved_bytes) / 2, rel=0.03)


def test_dropout_of_distributed_experts_is_kept_in_every_layer_with_recompute_exchange():
    """The bytes that dropout adds are compared."""

    def planned_and_saved_bytes(dropout):
        model, train = {"layers": 6, "dropout": dropout}, {"micro_batch_size": 4, "recompute": "exchange"}
        spec = tiny_spec(model=model, cluster={"workers": 2, "ep": 2}, data={"seq_len": 64}, train=train)
        return compute_memory(spec).activations, sum(run_ranks(2, autograd_bytes_of_rank, spec)) / 2

    plain, plain_saved = planned_and_saved_bytes(0.0)
    planned, saved = planned_and_saved_bytes(0.1)
    # The forward does not save the masks of the attention and of the dense layer in the block that the backward
    # recomputes.
    recomputed_masks = 2 * 4 * 64 * 32
    assert planned - plain == pytest.approx(saved - plain_saved + recomputed_masks, rel=0.05)


def test_expert_parallelism_distributes_experts_only():
    single_rank = compute_memory(tiny_spec(cluster={"workers": 1}))
    rank_of_group = compute_memory(tiny_spec(cluster={"workers": 4, "ep": 4}))
    experts = 4 * compute_sizes(tiny_spec().model).expert_parameters
    assert single_rank.weights - rank_of_group.weights == experts * 3 // 4
    assert rank_of_group.moments == 2 * rank_of_group.weights
    assert rank_of_group.activations == single_rank.activations
    assert rank_of_group.logits == single_rank.logits


@pytest.mark.parametrize(
    ("workers", "ep", "strategy", "shard_experts"),
    [(2, 2, "fsdp", False), (2, 1, "fsdp", True), (2, 2, "zero2", False)],
)
def test_planned_shards_equal_those_of_real_ranks(workers, ep, strategy, shard_experts):
    cluster = {"workers": workers, "ep": ep, "strategy": strategy, "shard_experts": shard_experts}
    spec = tiny_spec(cluster=cluster)
    ranks = run_ranks(workers, state_bytes_of_rank, spec)
    weights, gradients, moments = (sum(part) / workers for part in zip(*ranks, strict=True))
    memory = compute_memory(spec)
    assert memory.moments == pytest.approx(moments, rel=0.01)  # real slices are padded to whole numbers of values
    if strategy == "fsdp":
        assert memory.weights == weights
        assert memory.gradients == gradients


def buffer_bytes_of_saver(spec, path):
    """Train nothing, save two checkpoints below `path`, and return the bytes of the saver's buffers on this rank."""
    saver = Saver(RunDir(path), build_trainer(spec), group=1)
    for _ in range(2):
        saver.save(saver._trainer.zero_counts())
        saver.wait()
        saver._group += 1  # as another start would, so that the next checkpoint has its own folder
    return sum(buffer.nbytes for buffer in saver._buffers.values())


@pytest.mark.parametrize(("workers", "ep", "strategy"), [(1, 1, "ddp"), (2, 2, "ddp"), (2, 1, "fsdp"), (2, 2, "zero2")])
def test_the_copy_of_a_checkpoint_has_the_bytes_of_the_savers_buffers(tmp_path, workers, ep, strategy):
    spec, run = new_run(tmp_path, {"workers": workers, "ep": ep, "strategy": strategy})
    buffer_bytes = run_ranks(workers, buffer_bytes_of_saver, spec, run.path)
    assert checkpoint_copy_bytes(spec) * workers == sum(buffer_bytes)
    assert max(buffer_bytes) - min(buffer_bytes) < 300 * 32 * 4  # bytes of the largest tensor
    memory, gpus = compute_memory(spec), spec.cluster.model_copy(update={"gpus_per_worker": 1})
    assert memory.checkpoint_copy == checkpoint_copy_bytes(spec)
    assert compute_memory(spec.model_copy(update={"cluster": gpus})).total < memory.total


def test_each_strategy_needs_less_memory_than_the_one_before():
    memory_by_strategy = {
        s: compute_memory(tiny_spec(cluster={"workers": 4, "ep": 1, "strategy": s}))
        for s in ("ddp", "zero1", "zero2", "zero3")
    }
    # Bytes of the weights (with the shards that ZeRO itself keeps), of the gradients and of the two moments of AdamW.
    # The unit is a quarter of the model, which is the shard of one of four ranks.
    quarters = {"ddp": (4, 4, 8), "zero1": (4 + 1, 4, 2), "zero2": (4 + 1, 1, 2), "zero3": (1 + 1, 1, 2)}
    quarter = compute_sizes(tiny_spec().model).parameters  # a quarter of the bytes, because a parameter has 4
    for strategy, expected in quarters.items():
        memory = memory_by_strategy[strategy]
        assert (memory.weights, memory.gradients, memory.moments) == tuple(n * quarter for n in expected), strategy
    sharded = compute_memory(tiny_spec(cluster={"workers": 4, "ep": 1, "strategy": "fsdp", "shard_experts": True}))
    assert 4 * sharded.weights == memory_by_strategy["ddp"].weights
    assert memory_by_strategy["zero3"].moments == sharded.moments
    single_rank = tiny_spec(cluster={"workers": 1, "strategy": "fsdp"})
    assert compute_memory(single_rank) == compute_memory(tiny_spec(cluster={"workers": 1}))


def test_hybrid_sharding_holds_as_much_as_its_groups_alone():
    """Each of eight ranks in sharding groups of four holds as much as each of four ranks, with the same `ep`."""
    cluster = {"ep": 2, "strategy": "fsdp", "shard_experts": True}
    hybrid, group = (
        compute_memory(tiny_spec(cluster={**cluster, **sizes}, train={"micro_batches": 8}))
        for sizes in ({"workers": 8, "shard_group": 4}, {"workers": 4})
    )
    assert (hybrid.weights, hybrid.gradients, hybrid.moments) == (group.weights, group.gradients, group.moments)
    for state in run_ranks(4, state_bytes_of_rank, tiny_spec(cluster={**cluster, "workers": 4, "shard_group": 2})):
        expected = compute_memory(tiny_spec(cluster={**cluster, "workers": 2}))
        assert state == pytest.approx((expected.weights, expected.gradients, expected.moments), rel=0.05)


def peak_bytes_of_rank(spec):
    """Return the peak bytes that forward and backward of a micro-batch allocate on this rank, in addition to weights
    and gradients."""
    trainer = build_trainer(spec)
    batch = micro_batches(spec, 0)[trainer.mesh.rank :: trainer.mesh.world_size][:1]
    trainer.accumulate(batch)  # allocates the gradients before the measurement
    return peak_bytes(lambda: trainer.accumulate(batch), torch.device("cpu"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("workers", "strategy", "chunk_rows"), [(1, "ddp", None), (2, "ddp", None), (2, "fsdp", None), (1, "ddp", 24)]
)
def test_peak_memory_with_a_large_vocabulary_is_at_the_loss(workers, strategy, chunk_rows, precision):
    """The logits and all tensors that are computed from them exist at the same time at the peak, each of them once."""
    model = {**TRUNK, "vocab_size": 20_000, "d_model": 16, "d_ff": 32, "moe": None}
    train = {"micro_batch_size": 2, "micro_batches": 2, "precision": precision, "loss_chunk_rows": chunk_rows}
    cluster = {"workers": workers, "strategy": strategy}
    spec = tiny_spec(model=model, data={"seq_len": 256}, train=train, cluster=cluster)
    memory = compute_memory(spec)
    for peak in run_ranks(workers, peak_bytes_of_rank, spec):
        # The weights that fsdp gathers are not added: some of them exist only before the loss, or only after it.
        assert peak == pytest.approx(memory.activations + memory.copies + memory.logits, rel=0.03)


@pytest.mark.parametrize(
    ("experts", "ep", "mode", "min_ratio"),
    [
        ("dense", 1, "block", 3),
        ("multi-head", 1, "block", 3),
        ("static", 1, "block", 3),
        ("multi-head", 1, "experts", 1.05),
        ("multi-head", 2, "exchange", 1.5),
        ("multi-head", 2, "block", 3),
    ],
)
def test_recomputation_keeps_inputs_of_blocks_and_one_block(experts, ep, mode, min_ratio):
    """The planned difference between activations with and without recomputation is the measured one.

    With `exchange`, experts on several ranks also keep the exchanged rows, which are not sent again.
    """

    def activations_and_peak(recompute):
        model = {**spec_of("llama", experts).model.model_dump(), "layers": 8, "vocab_size": 50}
        # The masks of kernel `capacity` grow with the square of the number of tokens.
        train = {"micro_batch_size": 1 if experts == "static" else 8, "recompute": recompute}
        spec = tiny_spec(model=model, data={"seq_len": 256}, train=train, cluster={"workers": ep, "ep": ep})
        return compute_memory(spec).activations, sum(run_ranks(ep, peak_bytes_of_rank, spec)) / ep

    activations, peak = activations_and_peak("none")
    recomputed_activations, recomputed_peak = activations_and_peak(mode)
    assert recomputed_activations < activations / min_ratio
    # All other bytes of the backward pass are the same in both cases, or fewer with recomputation, so the peaks differ
    # by the activations.
    assert peak - recomputed_peak == pytest.approx(activations - recomputed_activations, rel=0.15)


def test_a_residual_stream_in_bfloat16_halves_what_recomputed_blocks_keep():
    def activations_and_peak(precision):
        model = {**spec_of("llama", "dense").model.model_dump(), "layers": 8, "vocab_size": 50}
        train = {"micro_batch_size": 4, "recompute": "block", "precision": "bfloat16", "residual_precision": precision}
        spec = tiny_spec(model=model, data={"seq_len": 256}, train=train)
        return compute_memory(spec).activations, run_ranks(1, peak_bytes_of_rank, spec)[0]

    activations, peak = activations_and_peak("float32")
    narrow_activations, narrow_peak = activations_and_peak("bfloat16")
    assert activations - narrow_activations == 8 * 4 * 256 * 96 * 2
    assert peak - narrow_peak == pytest.approx(activations - narrow_activations, rel=0.2)


@pytest.mark.parametrize(("shard_experts", "precision"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
def test_gathered_bytes_of_fsdp_are_those_of_a_real_rank(shard_experts, precision):
    """The planned bytes of gathered weights and of unsharded gradients are those of FSDP.

    The plan has one block more than the rank, because a CPU gathers no block in advance.
    """
    model = {**tiny_spec().model.model_dump(), "moe": {**EXPERTS["multi-head"], "every": 1}, "d_ff": None}
    cluster = {"workers": 2, "strategy": "fsdp", "shard_experts": shard_experts, "gather_precision": precision}
    spec = tiny_spec(model=model, cluster=cluster, train={"precision": precision})
    parameters, experts = block_sizes(spec.model), compute_sizes(spec.model).expert_parameters
    wide_parameters = float32_sizes(spec.model)
    block = gathered_bytes(spec, parameters.mixture + (experts // 2 if shard_experts else 0), wide_parameters.mixture)
    shards = compute_memory(spec).gradients - (0 if shard_experts else 4 * experts)
    # With gathers in bfloat16, norms and routers have FSDP groups of their own, in float32. Those of the block and of
    # the last norm are not gathered while the experts compute.
    later_bytes = 4 * (wide_parameters.mixture + wide_parameters.outside) if precision == "bfloat16" else 0
    for weights, gradients in run_ranks(2, unsharded_bytes_of_rank, spec):
        assert gathered_weight_bytes(spec) == weights + block + later_bytes
        assert unsharded_gradient_bytes(spec) == gradients[0] - shards
        assert gradients[-1] == 0
    single_micro_batch = tiny_spec(
        model=model, cluster=spec.cluster.model_dump(), train={"micro_batches": 2, "precision": precision}
    )
    outside = gathered_bytes(spec, parameters.outside, wide_parameters.outside)
    assert unsharded_gradient_bytes(single_micro_batch) == outside + block
    assert compute_memory(single_micro_batch).gathered == gathered_weight_bytes(
        single_micro_batch
    ) + unsharded_gradient_bytes(single_micro_batch)
    assert compute_memory(tiny_spec(cluster={"workers": 2})).gathered == 0
