"""Tests that a run on several processes has the gradients, losses and weights of the same run on one process."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.model.held import is_dtensor
from mhmoe_ray.planner.adapt import with_keys
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.search import choose_settings
from mhmoe_ray.train.objectives import MicroBatch
from tests.support.ranks import run_ranks
from tests.support.runs import new_run
from tests.support.specs import tiny_spec
from tests.train import jobs
from tests.train.alike import assert_alike

pytestmark = pytest.mark.long

STEPS = 20


def parallel_spec(workers, ep, strategy="ddp", shard_experts=False, dispatch="flat", **sections):
    cluster = {"workers": workers, "ep": ep, "strategy": strategy, "shard_experts": shard_experts}
    return tiny_spec(cluster={**cluster, "dispatch": dispatch}, **sections)


def capacity_fields(static):
    """Return the sections of a spec with a limited expert capacity, so that routes are dropped, if `static` is true."""
    if not static:
        return {}
    model = tiny_spec().model.model_dump()
    return {"model": {**model, "moe": {**model["moe"], "capacity_factor": 1.0}}}


@pytest.fixture(scope="module")
def reference():
    return run_ranks(1, jobs.train_and_collect, parallel_spec(1, 1), STEPS)[0]


@pytest.fixture(scope="module")
def reference_with_drops():
    return run_ranks(1, jobs.train_and_collect, parallel_spec(1, 1, **capacity_fields(True)), STEPS)[0]


WORLDS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
STRATEGIES = [("ddp", False), ("fsdp", False), ("fsdp", True), ("zero1", False), ("zero2", False), ("zero3", False)]
# These cases cover each world size, each strategy, and dropped routes both with sharded experts and without. The other
# cases are marked slow.
ALWAYS = {
    (2, 1, "zero3", False, False),
    (2, 2, "ddp", False, True),
    (2, 2, "zero2", False, False),
    (4, 2, "fsdp", True, True),
    (4, 4, "fsdp", False, False),
    (2, 1, "zero1", False, False),
}


def table():
    """Yield the arguments workers, ep, strategy, shard_experts, static of each case; those not in ALWAYS are slow."""
    for workers, ep in WORLDS:
        for strategy, shard_experts in STRATEGIES:
            if strategy == "zero3" and ep > 1:
                continue
            for static in (False, True):
                case = (workers, ep, strategy, shard_experts, static)
                name = f"{strategy}{'-experts' if shard_experts else ''}-{'drops' if static else 'dropless'}"
                marks = [] if case in ALWAYS else [pytest.mark.slow]
                yield pytest.param(*case, id=f"world{workers}-ep{ep}-{name}", marks=marks)


@pytest.mark.parametrize(("workers", "ep", "strategy", "shard_experts", "static"), list(table()))
def test_every_mesh_and_strategy_trains_like_one_process(request, workers, ep, strategy, shard_experts, static):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    expected = request.getfixturevalue("reference_with_drops" if static else "reference")
    spec = parallel_spec(workers, ep, strategy, shard_experts, **capacity_fields(static))
    for result in run_ranks(workers, jobs.train_and_collect, spec, STEPS):
        assert_alike(result, expected)


@pytest.mark.parametrize(
    "ep",
    [
        2,  # with 2, positions in the mesh differ from ranks
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_groups_by_node_train_like_one_process(reference, ep):
    for result in run_ranks(4, jobs.train_and_collect, parallel_spec(4, ep), STEPS, ["a", "b", "b", "a"]):
        assert_alike(result, reference)


@pytest.mark.parametrize(
    ("ep", "nodes", "strategy", "shard_experts", "static"),
    [
        (4, "aabb", "ddp", False, True),
        pytest.param(4, "aabb", "fsdp", False, False, marks=pytest.mark.slow),
        pytest.param(4, "abcd", "zero2", False, True, marks=pytest.mark.slow),
        pytest.param(2, "abcd", "fsdp", True, False, marks=pytest.mark.slow),
        pytest.param(2, "aabc", "ddp", False, False, marks=pytest.mark.slow),  # one of the two groups is within a node
        # The ranks form no grid here, so the dispatch stays flat.
        pytest.param(4, "aaab", "ddp", False, False, marks=pytest.mark.slow),
    ],
)
def test_hierarchical_dispatch_trains_like_one_process(request, ep, nodes, strategy, shard_experts, static):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    expected = request.getfixturevalue("reference_with_drops" if static else "reference")
    spec = parallel_spec(4, ep, strategy, shard_experts, "hierarchical", **capacity_fields(static))
    for result in run_ranks(4, jobs.train_and_collect, spec, STEPS, list(nodes)):
        assert_alike(result, expected)


@pytest.mark.parametrize(
    ("workers", "memory_share", "choice"),
    [
        (2, 2.0, (1, "ddp", "none")),
        (2, 1.0, (1, "fsdp", "experts")),
        (4, 0.8, (4, "fsdp", "exchange")),
    ],
)
def test_settings_chosen_for_a_cluster_train_like_one_process(reference, workers, memory_share, choice):
    cluster = {"workers": workers, "gpus_per_worker": 1}
    needed_bytes = compute_memory(tiny_spec(cluster=cluster)).total
    spec = tiny_spec(cluster={**cluster, "accelerator": {"memory": memory_share * needed_bytes}})
    spec = with_keys(choose_settings(spec)[0], {"cluster.gpus_per_worker": 0, "train.compile": False})
    assert (spec.cluster.ep, spec.cluster.strategy, spec.train.recompute) == choice
    for result in run_ranks(workers, jobs.train_and_collect, spec, STEPS):
        assert_alike(result, reference)


@pytest.fixture(scope="module")
def reference_with_xmoe():
    return run_ranks(1, jobs.train_and_collect, parallel_spec(1, 1, **xmoe_fields()), STEPS)[0]


def xmoe_fields():
    model = tiny_spec().model.model_dump()
    return {"model": {**model, "moe": {**model["moe"], "router": "xmoe"}}, "train": {"expert_lr_ratio": 0.5}}


@pytest.mark.parametrize(
    ("workers", "ep", "strategy"),
    [
        (2, 2, "fsdp"),
        (2, 1, "zero2"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 2, "ddp"), (2, 2, "zero1"), (2, 1, "zero3")]),
    ],
)
def test_learned_temperature_and_slower_experts_train_like_one_process(reference_with_xmoe, workers, ep, strategy):
    """The temperature is a parameter of one element, so with fsdp only one rank has it."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    for result in run_ranks(
        workers, jobs.train_and_collect, parallel_spec(workers, ep, strategy, **xmoe_fields()), STEPS
    ):
        assert_alike(result, reference_with_xmoe)


@pytest.fixture(scope="module")
def reference_with_wide_sub_tokens():
    return run_ranks(1, jobs.train_and_collect, parallel_spec(1, 1, **wide_fields()), STEPS)[0]


def wide_fields():
    """Return the sections of a spec whose sub-tokens are as wide as their tokens, with projections of two layers."""
    model = tiny_spec().model.model_dump()
    return {"model": {**model, "moe": {**model["moe"], "heads": 3, "d_sub_token": 32, "projection_layers": 2}}}


@pytest.mark.parametrize(
    ("workers", "ep", "strategy", "dispatch"),
    [
        (2, 1, "fsdp", "flat"),
        (2, 2, "ddp", "flat"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(4, 4, "ddp", "hierarchical"), (4, 2, "fsdp", "flat"), (2, 1, "zero3", "flat")]
        ),
    ],
)
def test_wide_sub_tokens_train_like_one_process(reference_with_wide_sub_tokens, workers, ep, strategy, dispatch):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    spec = parallel_spec(workers, ep, strategy, strategy == "fsdp", dispatch, **wide_fields())
    for result in run_ranks(workers, jobs.train_and_collect, spec, STEPS, list("aabb")[:workers]):
        assert result["gradients"]["blocks.1.moe.experts.up_EFD"].shape == (4, 24, 32)
        assert_alike(result, reference_with_wide_sub_tokens)


def test_groups_by_node_with_sharded_experts_train_like_one_process(reference):
    """The mesh for these nodes has the higher of the two ranks with the same experts first."""
    for result in run_ranks(4, jobs.train_and_collect, parallel_spec(4, 2, "fsdp", True), STEPS, ["a", "b", "b", "a"]):
        assert_alike(result, reference)


@pytest.fixture(scope="module")
def reference_in_bfloat16():
    spec = parallel_spec(1, 1, train={"precision": "bfloat16"})
    return run_ranks(1, jobs.train_and_collect, spec, STEPS)[0]


@pytest.mark.parametrize(
    ("workers", "ep", "strategy"),
    [
        # Two ranks have two micro-batches each, whose gradients accumulate.
        (2, 2, "ddp"),
        (2, 1, "fsdp"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, 2, "fsdp"), (2, 2, "zero1"), (4, 2, "zero2")]),
    ],
)
def test_bfloat16_losses_match_one_process(reference_in_bfloat16, workers, ep, strategy):
    """All strategies have weights, updates and sums over ranks in float32, and gradients near those of one process.

    Products are rounded as on one process, but gradients of weights are rounded once for each rank.
    """
    spec = parallel_spec(workers, ep, strategy, strategy == "fsdp", train={"precision": "bfloat16"})
    for result in run_ranks(workers, jobs.train_and_collect, spec, STEPS):
        assert result["losses"] == pytest.approx(reference_in_bfloat16["losses"], rel=2e-3)
        for name, gradient in reference_in_bfloat16["gradients"].items():
            assert result["gradients"][name].dtype == torch.float32
            assert (result["gradients"][name] - gradient).norm() < 0.02 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize(
    ("workers", "ep", "recompute", "reduce_precision"),
    [
        (4, 2, "exchange", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(2, 1, "none", "float32"), (2, 1, "block", "bfloat16"), (2, 2, "block", "float32")]
        ),
    ],
)
def test_gathers_in_bfloat16_match_one_process(reference_in_bfloat16, workers, ep, recompute, reduce_precision):
    """Matrix products read the same weights as with autocast, which would round them, too.

    Embeddings are rounded only in gathers, so some tokens choose other experts.
    """
    cluster = {"workers": workers, "ep": ep, "strategy": "fsdp", "shard_experts": True}
    cluster |= {"gather_precision": "bfloat16", "reduce_precision": reduce_precision}
    spec = tiny_spec(cluster=cluster, train={"precision": "bfloat16", "recompute": recompute})
    for result in run_ranks(workers, jobs.train_and_collect, spec, STEPS):
        assert result["losses"] == pytest.approx(reference_in_bfloat16["losses"], rel=2e-3)
        for name, gradient in reference_in_bfloat16["gradients"].items():
            assert result["gradients"][name].dtype == result["weights"][name].dtype == torch.float32
            assert (result["gradients"][name] - gradient).norm() < 0.06 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize(
    ("workers", "ep", "strategy"), [(1, 1, "ddp"), pytest.param(4, 2, "fsdp", marks=pytest.mark.slow)]
)
def test_a_residual_stream_in_bfloat16_trains_like_one_in_float32(reference_in_bfloat16, workers, ep, strategy):
    """The residual stream is rounded after each of its four additions, by at most 1 / 256 of each value."""
    train = {"precision": "bfloat16", "residual_precision": "bfloat16", "recompute": "block"}
    spec = parallel_spec(workers, ep, strategy, strategy == "fsdp", train=train)
    for result in run_ranks(workers, jobs.train_and_collect, spec, STEPS):
        assert result["losses"] == pytest.approx(reference_in_bfloat16["losses"], rel=5e-3)
        assert result["losses"] != reference_in_bfloat16["losses"]
        for name, gradient in reference_in_bfloat16["gradients"].items():
            assert (result["gradients"][name] - gradient).norm() < 0.15 * gradient.norm() + 1e-9, name


def test_moments_in_bfloat16_train_like_those_in_float32(reference):
    """The losses of 20 steps differ slightly, because moments are rounded, by at most 1 / 128 of each value."""
    spec = parallel_spec(1, 1, train={"moment_precision": "bfloat16"})
    [result] = run_ranks(1, jobs.train_and_collect, spec, STEPS)
    assert result["losses"] == pytest.approx(reference["losses"], rel=2e-3)
    assert result["losses"] != reference["losses"]


def train_compiled(spec, steps):
    """Return the results of `train_and_collect`, and the number of graphs that were compiled."""
    from torch._dynamo.utils import counters

    return jobs.train_and_collect(spec, steps), counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "ep", "strategy", "shard_experts", "recompute"),
    [
        (1, 1, "ddp", False, "none"),
        (2, 1, "ddp", False, "block"),
        (2, 2, "ddp", False, "exchange"),
        (2, 2, "fsdp", False, "none"),
        (2, 1, "fsdp", True, "experts"),
        (4, 2, "fsdp", True, "exchange"),
        (2, 1, "zero1", False, "none"),
        (2, 2, "zero2", False, "none"),
        (2, 1, "zero3", False, "none"),
    ],
)
def test_compiled_blocks_train_like_one_process(reference, workers, ep, strategy, shard_experts, recompute):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    spec = parallel_spec(workers, ep, strategy, shard_experts, train={"compile": True, "recompute": recompute})
    for result, graphs in run_ranks(workers, train_compiled, spec, STEPS):
        assert graphs > 0
        assert_alike(result, reference)


FIRST_PAPER = {
    "backbone": "subln",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "moe": {
        "router": "xmoe_torchscale",
        "normalize_gates": True,
        "second_expert": "random",
        "capacity_factor": 1.0,
        "z_weight": 0.01,
    },
}
OTHER_FEATURES = {
    "moe": {
        "router": "xmoe",
        "bias_rate": 0.01,
        "jitter": 0.1,
        "d_shared": 16,
        "sub_token_residual": True,
        "balance_choices": "all",
    },
}


def merged_model(model):
    """Return a section of a spec: the tiny model with the keys of `model`, and of `model["moe"]`, replaced."""
    base = tiny_spec().model.model_dump()
    return {"model": {**base, **model, "moe": {**base["moe"], **model["moe"]}}}


@pytest.mark.parametrize(
    "model",
    [{"moe": {}}, FIRST_PAPER, OTHER_FEATURES, {"moe": {"balance_over": "step", "balance_choices": "all"}}],
    ids=["plain", "first-paper", "others", "balance-over-steps"],
)
def test_recomputation_is_bit_identical(model):
    expected, result = (
        jobs.train_and_collect(parallel_spec(1, 1, train={"recompute": recompute}, **merged_model(model)), 5)
        for recompute in ("none", "block")
    )
    assert result["losses"] == expected["losses"]
    for part in ("gradients", "weights", "moments"):
        assert all(torch.equal(result[part][name], tensor) for name, tensor in expected[part].items())


@pytest.mark.parametrize(
    ("workers", "ep", "strategy", "dispatch", "recompute"),
    [
        (2, 1, "fsdp", "flat", "block"),
        (2, 2, "ddp", "flat", "exchange"),
        (4, 2, "fsdp", "flat", "block"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (2, 2, "fsdp", "flat", "exchange"),
                (2, 2, "ddp", "flat", "experts"),
                (2, 2, "ddp", "flat", "block"),
                (4, 4, "ddp", "hierarchical", "block"),
                (2, 2, "zero2", "flat", "block"),
                (2, 1, "zero3", "flat", "block"),
            ]
        ),
    ],
)
def test_recomputation_on_several_ranks_trains_like_one_process(reference, workers, ep, strategy, dispatch, recompute):
    """Recomputation gathers sharded weights again and, for whole blocks, exchanges rows again."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    spec = parallel_spec(workers, ep, strategy, strategy == "fsdp", dispatch, train={"recompute": recompute})
    for result in run_ranks(workers, jobs.train_and_collect, spec, STEPS):
        assert_alike(result, reference)


@pytest.mark.parametrize(
    ("ep", "shard_experts", "shard_group"),
    [
        (2, True, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, False, 2), (1, True, 2), (2, True, 4), (1, True, 1), (4, False, 4)]
        ),
    ],
)
def test_hybrid_sharding_trains_like_one_process(reference, ep, shard_experts, shard_group):
    """Each group of `shard_group` ranks shards the whole model; gradients are summed over the groups."""
    cluster = {"workers": 4, "ep": ep, "strategy": "fsdp", "shard_experts": shard_experts, "shard_group": shard_group}
    for result in run_ranks(4, jobs.train_and_collect, tiny_spec(cluster=cluster), STEPS):
        assert_alike(result, reference)


@pytest.mark.parametrize(
    ("workers", "ep", "strategy", "chunk_rows"),
    [
        (1, 1, "ddp", 5),
        (2, 2, "ddp", 9),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (4, 2, "fsdp", 16),
                (2, 1, "zero3", 7),
                (2, 1, "zero2", 1000),
                (2, 1, "zero1", 3),
            ]
        ),
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_chunked_loss_trains_like_all_logits(workers, ep, strategy, chunk_rows, tied):
    """The gradient of a tied embedding is a sum of two: one is from the chunked loss, and one from the input tokens."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    sections = merged_model({"tied_embeddings": tied, "moe": {}})
    expected = jobs.train_and_collect(parallel_spec(1, 1, **sections), STEPS)
    train = {"loss_chunk_rows": chunk_rows}
    spec = parallel_spec(workers, ep, strategy, strategy == "fsdp", train=train, **sections)
    for result in run_ranks(workers, jobs.train_and_collect, spec, STEPS):
        assert_alike(result, expected)


def train_with_root(spec, reshards_root):
    """Return the results of `train_and_collect`; with `reshards_root`, the root's tensors are gathered twice."""
    if reshards_root:
        FSDPModule.set_reshard_after_forward = lambda *_, **__: None
    return jobs.train_and_collect(spec, STEPS)


def test_fsdp_trains_alike_with_and_without_its_root_sharded_between_passes():
    spec = parallel_spec(2, 1, "fsdp", True)
    kept_results, resharded_results = (run_ranks(2, train_with_root, spec, flag) for flag in (False, True))
    for result, expected in zip(kept_results, resharded_results, strict=True):
        assert result["losses"] == expected["losses"]
        assert all(torch.equal(result["weights"][name], tensor) for name, tensor in expected["weights"].items())


def root_states(spec):
    """Return whether the embedding is a shard after a validation and after a step."""
    trainer = jobs.build_trainer(spec)
    states = []
    trainer.objective.validate_part(MicroBatch(*jobs.validation_samples(spec)))
    states.append(is_dtensor(trainer.model.embedding.weight))
    trainer.accumulate(jobs.rank_batches(spec, 0, trainer))
    states.append(is_dtensor(trainer.model.embedding.weight))
    return states


def test_code_between_steps_sees_shards():
    assert run_ranks(2, root_states, parallel_spec(2, 1, "fsdp")) == [[True, True]] * 2


@pytest.mark.parametrize("shard_experts", [False, True])
def test_gradients_reduced_after_each_micro_batch_are_those_of_one_reduction(reference, shard_experts):
    spec = parallel_spec(2, 1, "fsdp", shard_experts)
    spec = with_keys(spec, {"cluster.reduce_after": "micro_batch"})
    for result in run_ranks(2, jobs.train_and_collect, spec, STEPS):
        assert_alike(result, reference)


def train_one_step(spec):
    """Return the loss, the bytes sent by dispatch, and the full gradients of one step."""
    trainer = jobs.build_trainer(spec)
    sums = trainer.accumulate(jobs.rank_batches(spec, 0, trainer))
    return sums.loss, sums.sent_bytes, jobs.full_gradients(trainer)


def test_recomputation_sends_rows_again_only_for_whole_blocks():
    """Losses and gradients are the same with and without recomputation.

    A forward pass sends half of the rows of a step, so its repetition adds half of them. It sends no counts again.
    """
    expected, exchange_result, block_result = (
        run_ranks(2, train_one_step, parallel_spec(2, 2, train={"recompute": recompute}, **merged_model(FIRST_PAPER)))[
            0
        ]
        for recompute in ("none", "exchange", "block")
    )
    assert exchange_result[:2] == expected[:2]
    assert block_result[0] == expected[0]
    assert block_result[1].rows == expected[1].rows * 3 // 2
    assert block_result[1].counts == expected[1].counts
    for result in (exchange_result, block_result):
        assert all(torch.equal(result[2][name], tensor) for name, tensor in expected[2].items())


OVER_SEQUENCES = {"moe": {"balance_over": "sequence", "balance_weight": 0.5, "scoring": "sigmoid"}}
OVER_STEPS = {"moe": {"balance_over": "step", "balance_weight": 0.5, "balance_choices": "all"}}
ROUTINGS = {"first-paper": FIRST_PAPER, "others": OTHER_FEATURES, "sequences": OVER_SEQUENCES, "steps": OVER_STEPS}


@pytest.mark.parametrize("model", ROUTINGS.values(), ids=ROUTINGS)
def test_routing_is_the_same_on_any_number_of_ranks(model):
    """Capacity, random draws and the balance loss depend on the micro-batch only, and a selection bias on the step."""
    sections = merged_model(model)
    [reference] = run_ranks(1, jobs.train_and_collect, parallel_spec(1, 1, **sections), 8)
    for result in run_ranks(2, jobs.train_and_collect, parallel_spec(2, 2, **sections), 8):
        for name, expected in reference["gradients"].items():
            assert (result["gradients"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-4)
        assert result["weights"].keys() == reference["weights"].keys()
        for name, expected in reference["weights"].items():
            torch.testing.assert_close(result["weights"][name], expected, atol=1e-3, rtol=1e-3, msg=name)
    biases = [t for name, t in reference["weights"].items() if name.endswith("bias_E")]
    assert all(b.any() for b in biases)
    assert len(biases) == ("bias_rate" in model["moe"])


def test_balance_over_sequences_does_not_depend_on_the_size_of_micro_batches():
    """The same samples in micro-batches of one and of two sequences give the same gradients."""
    sections = merged_model(OVER_SEQUENCES)
    specs = [
        parallel_spec(1, 1, train={"micro_batches": batches, "micro_batch_size": size}, **sections)
        for batches, size in ((8, 1), (4, 2))
    ]
    token_BT = torch.cat([batch.token_BT for batch in jobs.micro_batches(specs[0], 0)])
    gradients = []
    for spec in specs:
        trainer = jobs.build_trainer(spec)
        parts = token_BT.split(spec.train.micro_batch_size)
        trainer.accumulate([MicroBatch(part, torch.ones_like(part[:, 1:], dtype=torch.bool)) for part in parts])
        gradients.append(jobs.full_gradients(trainer))
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


def test_shares_of_the_last_step_are_in_a_checkpoint(tmp_path):
    """Training that goes on from a checkpoint, on other ranks too, has the losses of training that never stopped."""
    spec, run = new_run(tmp_path, {"workers": 1}, **merged_model(OVER_STEPS))
    trainer = jobs.build_trainer(spec)
    jobs.train(spec, trainer, 3)
    share_E = trainer.model.moe_layers()[0].router.share_E
    assert share_E.sum().item() == pytest.approx(1)
    assert not torch.allclose(share_E, torch.full_like(share_E, 1 / len(share_E)))
    assert not any("share_E" in name for name in trainer.model.named_tensors())
    jobs.save_checkpoint(run, trainer)
    expected = jobs.train_and_collect(spec, 6)["losses"][3:]
    checkpoint = newest_checkpoint(run)[0]
    assert jobs.load_and_describe(spec, checkpoint, 3)["losses"] == expected
    parallel = parallel_spec(2, 2, **merged_model(OVER_STEPS))
    for result in run_ranks(2, jobs.load_and_describe, parallel, checkpoint, 3):
        assert result["losses"] == pytest.approx(expected, rel=1e-4)


def test_losses_fall_and_gradients_are_not_zero(reference):
    assert all(g.norm() > 0 for g in reference["gradients"].values())
    assert reference["losses"][-1] < reference["losses"][0] - 2


def test_bfloat16_stays_near_float32(reference):
    spec = parallel_spec(2, 2, train={"precision": "bfloat16"})
    for result in run_ranks(2, jobs.train_and_collect, spec, STEPS):
        assert result["losses"] == pytest.approx(reference["losses"], abs=0.05)


# Without rows, kernel `auto` gives gradients of zeros, and kernel `reference` gives none.
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_a_rank_whose_experts_get_no_rows_takes_part(kernel):
    first_result, second_result = run_ranks(
        2, jobs.train_without_rows, parallel_spec(2, 2, **merged_model({"moe": {"kernel": kernel}}))
    )
    for result in (first_result, second_result):
        assert not result["counts"][:, :2].any()
        assert result["counts"][:, 2:].all()
        assert all(torch.isfinite(w).all() for w in result["weights"])


def test_validation_counts_each_target_once_on_any_world_size():
    g = torch.Generator().manual_seed(0)
    token = torch.randint(300, (7, 17), generator=g)  # 7 samples, which 4 ranks cannot share evenly
    counts = torch.rand(7, 16, generator=g) < 0.8
    expected = run_ranks(1, jobs.validation_loss, parallel_spec(1, 1), token, counts)[0]
    assert expected[1] == int(counts.sum())
    for result in run_ranks(4, jobs.validation_loss, parallel_spec(4, 2), token, counts):
        assert result[0] == pytest.approx(expected[0], rel=1e-6)
        assert result[1] == expected[1]
