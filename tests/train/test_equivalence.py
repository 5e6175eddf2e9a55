"""The same run on one process and spread over several: gradients, losses and weights are the same."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.specs import tiny_spec
from tests.train import jobs

STEPS = 20


def spread(workers, ep, strategy="ddp", shard_experts=False, dispatch="flat", **sections):
    cluster = {"workers": workers, "ep": ep, "strategy": strategy, "shard_experts": shard_experts}
    return tiny_spec(cluster={**cluster, "dispatch": dispatch}, **sections)


def limited(static):
    """Return the keys of a spec whose model drops routes if `static`, and else does not."""
    if not static:
        return {}
    model = tiny_spec().model.model_dump()
    return {"model": {**model, "moe": {**model["moe"], "capacity_factor": 1.0}}}


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, jobs.gradients_then_losses, spread(1, 1), STEPS)[0]


@pytest.fixture(scope="module")
def alone_with_drops():
    return run_ranks(1, jobs.gradients_then_losses, spread(1, 1, **limited(True)), STEPS)[0]


WORLDS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
STRATEGIES = [("ddp", False), ("fsdp", False), ("fsdp", True), ("zero1", False), ("zero2", False), ("zero3", False)]
# Each world, each strategy, and drops with both kinds of experts; the rest of the table is slow.
ALWAYS = {
    (2, 1, "zero3", False, False),
    (2, 2, "ddp", False, True),
    (2, 2, "zero2", False, False),
    (4, 2, "fsdp", True, True),
    (4, 4, "fsdp", False, False),
    (2, 1, "zero1", False, False),
}


def table():
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
def test_any_spread_and_strategy_trains_alike(request, workers, ep, strategy, shard_experts, static):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    expected = request.getfixturevalue("alone_with_drops" if static else "alone")
    spec = spread(workers, ep, strategy, shard_experts, **limited(static))
    for found in run_ranks(workers, jobs.gradients_then_losses, spec, STEPS):
        assert_alike(found, expected)


@pytest.mark.parametrize(
    "ep",
    [
        2,  # places in the mesh are other than ranks then
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_groups_by_node_train_alike(alone, ep):
    for found in run_ranks(4, jobs.gradients_then_losses, spread(4, ep), STEPS, ["a", "b", "b", "a"]):
        assert_alike(found, alone)


@pytest.mark.parametrize(
    ("ep", "nodes", "strategy", "shard_experts", "static"),
    [
        (4, "aabb", "ddp", False, True),
        pytest.param(4, "aabb", "fsdp", False, False, marks=pytest.mark.slow),
        pytest.param(4, "abcd", "zero2", False, True, marks=pytest.mark.slow),
        pytest.param(2, "abcd", "fsdp", True, False, marks=pytest.mark.slow),
        pytest.param(2, "aabc", "ddp", False, False, marks=pytest.mark.slow),  # one group within a node
        pytest.param(4, "aaab", "ddp", False, False, marks=pytest.mark.slow),  # flat, as it is no grid
    ],
)
def test_hierarchical_dispatch_trains_alike(request, ep, nodes, strategy, shard_experts, static):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    expected = request.getfixturevalue("alone_with_drops" if static else "alone")
    spec = spread(4, ep, strategy, shard_experts, "hierarchical", **limited(static))
    for found in run_ranks(4, jobs.gradients_then_losses, spec, STEPS, list(nodes)):
        assert_alike(found, expected)


@pytest.fixture(scope="module")
def alone_with_xmoe():
    return run_ranks(1, jobs.gradients_then_losses, spread(1, 1, **with_xmoe()), STEPS)[0]


def with_xmoe():
    model = tiny_spec().model.model_dump()
    return {"model": {**model, "moe": {**model["moe"], "router": "xmoe"}}}


@pytest.mark.parametrize(
    ("workers", "ep", "strategy"),
    [
        (2, 2, "fsdp"),
        (2, 1, "zero2"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 2, "ddp"), (2, 2, "zero1"), (2, 1, "zero3")]),
    ],
)
def test_a_router_with_a_learnt_temperature_trains_alike(alone_with_xmoe, workers, ep, strategy):
    """The temperature is a single number, which some strategies would refuse."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    for found in run_ranks(workers, jobs.gradients_then_losses, spread(workers, ep, strategy, **with_xmoe()), STEPS):
        assert_alike(found, alone_with_xmoe)


def assert_alike(found, expected):
    for name, gradient in expected["gradients"].items():
        assert (found["gradients"][name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-9, f"gradient of {name}"
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    # What clipping divides by, which Adam would hide.
    assert found["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    for part, atol in (("weights", 1e-3), ("moments", 1e-5)):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            torch.testing.assert_close(found[part][name], tensor, atol=atol, rtol=1e-2, msg=f"{part}: {name}")
    assert found["validation"] == pytest.approx(expected["validation"], rel=1e-4)


def test_groups_by_node_train_alike_where_experts_are_sliced_too(alone):
    """The mesh has the higher rank of an expert's two holders first."""
    for found in run_ranks(4, jobs.gradients_then_losses, spread(4, 2, "fsdp", True), STEPS, ["a", "b", "b", "a"]):
        assert_alike(found, alone)


@pytest.fixture(scope="module")
def alone_in_bfloat16():
    spec = spread(1, 1, train={"precision": "bfloat16"})
    return run_ranks(1, jobs.gradients_then_losses, spec, STEPS)[0]


@pytest.mark.parametrize(
    ("workers", "ep", "strategy"),
    [
        (2, 2, "ddp"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, 2, "fsdp"), (2, 2, "zero1"), (4, 2, "zero2")]),
    ],
)
def test_in_bfloat16_the_losses_are_those_of_one_process_too(alone_in_bfloat16, workers, ep, strategy):
    """Weights, their updates and the sums over ranks are float32 in all strategies.

    Products are rounded as on one process, but those of weights' gradients are rounded once for each rank.
    """
    spec = spread(workers, ep, strategy, strategy == "fsdp", train={"precision": "bfloat16"})
    for found in run_ranks(workers, jobs.gradients_then_losses, spec, STEPS):
        assert found["losses"] == pytest.approx(alone_in_bfloat16["losses"], rel=2e-3)
        for name, gradient in alone_in_bfloat16["gradients"].items():
            assert found["gradients"][name].dtype == torch.float32
            assert (found["gradients"][name] - gradient).norm() < 0.02 * gradient.norm() + 1e-9, name


def compiled(spec, steps):
    """Return the results of `gradients_then_losses`, and the number of graphs that were compiled."""
    from torch._dynamo.utils import counters

    return jobs.gradients_then_losses(spec, steps), counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "ep", "strategy"), [(1, 1, "ddp"), (2, 2, "ddp"), (2, 2, "fsdp")])
def test_compiled_dense_parts_train_alike(alone, workers, ep, strategy):
    spec = spread(workers, ep, strategy, train={"compile": True})
    for found, graphs in run_ranks(workers, compiled, spec, STEPS):
        assert graphs > 0
        assert_alike(found, alone)


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
OTHERS = {
    "moe": {
        "router": "xmoe",
        "bias_rate": 0.01,
        "jitter": 0.1,
        "d_shared": 16,
        "sub_token_residual": True,
        "balance_choices": "all",
    },
}


def merged_with(model):
    base = tiny_spec().model.model_dump()
    return {"model": {**base, **model, "moe": {**base["moe"], **model["moe"]}}}


@pytest.mark.parametrize("model", [{"moe": {}}, FIRST_PAPER, OTHERS], ids=["plain", "first-paper", "others"])
def test_recomputing_changes_no_bit_whatever_is_drawn(model):
    expected, found = (
        jobs.gradients_then_losses(spread(1, 1, train={"recompute": recompute}, **merged_with(model)), 5)
        for recompute in (False, True)
    )
    assert found["losses"] == expected["losses"]
    for part in ("gradients", "weights", "moments"):
        assert all(torch.equal(found[part][name], tensor) for name, tensor in expected[part].items())


@pytest.mark.parametrize(("ep", "strategy"), [(1, "fsdp"), (2, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.slow)])
def test_recomputing_trains_alike_where_tensors_are_spread(alone, ep, strategy):
    """Slices are gathered a second time, and nothing is exchanged a second time."""
    spec = spread(2, ep, strategy, strategy == "fsdp", train={"recompute": True})
    for found in run_ranks(2, jobs.gradients_then_losses, spec, STEPS):
        assert_alike(found, alone)


def recomputing(spec):
    """Return the loss, the exchanged rows and the gradients of one step."""
    trainer = jobs.trainer_of(spec)
    sums = trainer.accumulate(jobs.batches(spec, 0, trainer))
    return sums.loss, sums.sent, jobs.gradients(trainer)


def test_recomputing_sends_no_row_twice_and_changes_no_bit():
    expected, found = (
        run_ranks(2, recomputing, spread(2, 2, train={"recompute": recompute}, **merged_with(FIRST_PAPER)))[0]
        for recompute in (False, True)
    )
    assert found[:2] == expected[:2]
    assert all(torch.equal(found[2][name], tensor) for name, tensor in expected[2].items())


@pytest.mark.parametrize("model", [FIRST_PAPER, OTHERS], ids=["first-paper", "others"])
def test_routing_with_drops_noise_and_biases_is_the_same_on_any_number_of_ranks(model):
    """Capacity, draws and balance belong to a micro-batch, wherever it is computed; a bias belongs to the whole
    step."""
    merged = merged_with(model)
    [alone] = run_ranks(1, jobs.gradients_then_losses, spread(1, 1, **merged), 8)
    for found in run_ranks(2, jobs.gradients_then_losses, spread(2, 2, **merged), 8):
        for name, expected in alone["gradients"].items():
            assert (found["gradients"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert found["weights"].keys() == alone["weights"].keys()
        for name, expected in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], expected, atol=1e-3, rtol=1e-3, msg=name)
    biases = [t for name, t in alone["weights"].items() if name.endswith("bias_E")]
    assert all(b.any() for b in biases)
    assert len(biases) == ("bias_rate" in model["moe"])


def test_losses_fall_and_gradients_are_not_zero(alone):
    assert all(g.norm() > 0 for g in alone["gradients"].values())
    assert alone["losses"][-1] < alone["losses"][0] - 2


def test_bfloat16_stays_near_float32(alone):
    spec = spread(2, 2, train={"precision": "bfloat16"})
    for found in run_ranks(2, jobs.gradients_then_losses, spec, STEPS):
        assert found["losses"] == pytest.approx(alone["losses"], abs=0.05)


@pytest.mark.parametrize("kernel", ["auto", "reference"])  # the one gives gradients of zeros then, the other none
def test_a_rank_whose_experts_get_no_rows_takes_part(kernel):
    first, second = run_ranks(2, jobs.nothing_to_do, spread(2, 2, **merged_with({"moe": {"kernel": kernel}})))
    for found in (first, second):
        assert not found["counts"][:, :2].any()
        assert found["counts"][:, 2:].all()
        assert all(torch.isfinite(w).all() for w in found["weights"])


def test_validation_is_the_same_on_any_world_and_counts_each_target_once():
    g = torch.Generator().manual_seed(0)
    token = torch.randint(300, (7, 17), generator=g)  # 7 samples do not divide evenly
    counts = torch.rand(7, 16, generator=g) < 0.8
    expected = run_ranks(1, jobs.validation_loss, spread(1, 1), token, counts)[0]
    assert expected[1] == int(counts.sum())
    for found in run_ranks(4, jobs.validation_loss, spread(4, 2), token, counts):
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert found[1] == expected[1]
