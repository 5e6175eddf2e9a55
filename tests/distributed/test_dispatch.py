"""Tests of flat dispatch between processes, against all rows and experts in one process."""

import gc
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import mhmoe_kernels
from mhmoe_ray.distributed.dispatch import flat
from mhmoe_ray.distributed.dispatch.exchange import flat_row_bytes
from mhmoe_ray.distributed.dispatch.flat import FlatDispatch
from mhmoe_ray.distributed.dispatch.inner_pass import InnerPass
from mhmoe_ray.model.feedforward import SharedExpert
from tests.distributed.routed import (
    EXPERTS_PER_RANK,
    WIDTH,
    Case,
    LivingObjects,
    assert_equal_to_one_process,
    build_problem,
    build_shared_layer,
    count_living_after_recomputation,
    outputs_and_gradients,
)
from tests.support.ranks import run_ranks

RANKS = 3

CASES = {
    "swiglu": Case(),
    "gelu": Case(model=(("backbone", "subln"),)),
    "recomputed": Case(kernel="grouped", recompute=1.0),
    "kernel without sorted rows": Case(kernel="reference"),
    "many choices": Case(top_k=5),
    "no row at a rank": Case(rows=(11, 0, 9)),
    "no row anywhere": Case(rows=(0, 0, 0)),
    "an expert without rows": Case(used_experts=(0, 1, 2, 4, 5)),
    "all rows to one rank": Case(used_experts=(2, 3)),
    "all rows of a gelu to one rank": Case(used_experts=(2, 3), model=(("backbone", "subln"),)),
    "every row at home": Case(used_experts=(0, 1), is_local=True),
    "some routes dropped": Case(dropped=0.4),
    "all in bfloat16": Case(dtype=torch.bfloat16),
    "shared expert": Case(has_shared_expert=True),
    "shared expert of no row": Case(rows=(11, 0, 9), has_shared_expert=True, model=(("backbone", "subln"),)),
    "autocast": Case(dtype=torch.float32, autocast=True),
    "autocast of a gelu": Case(dtype=torch.float32, autocast=True, model=(("backbone", "subln"),)),
}


def results_of_rank():
    """Return this rank's results of each case: outputs, gradients, sent bytes, and a forward that records no graph.

    Two further keys belong to the last case: "parts" has the gradient of another backward, between the numbers of live
    passes before and after it; "after recomputation" has the result of `count_living_after_recomputation`.
    """
    rank, results = dist.get_rank(), {}
    expert_ids = range(rank * EXPERTS_PER_RANK, (rank + 1) * EXPERTS_PER_RANK)
    for name, case in CASES.items():
        dispatch = FlatDispatch(dist.group.WORLD)
        experts, *problem = build_problem(case, expert_ids, rank)
        tensors, routing = outputs_and_gradients(case, dispatch, experts, *problem)
        sent_bytes = dispatch.pop_sent_bytes()
        saved_tensors = []
        hooks = torch.autograd.graph.saved_tensors_hooks(saved_tensors.append, lambda t: t)
        with torch.no_grad(), hooks, torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            shared = SharedExpert(build_shared_layer(case), problem[0]) if case.has_shared_expert else None
            output, shared_output = dispatch(problem[0], routing, experts, shared)
            output = output if shared_output is None else output + shared_output
        row_bytes = WIDTH * (2 if case.autocast else case.dtype.itemsize)
        results[name] = {
            "tensors": tensors,
            "without gradients": (output, output.requires_grad, len(saved_tensors), dispatch.pop_sent_bytes()),
            "sent": sent_bytes,
            "least": flat_row_bytes(routing.count_E[None], expert_ids, row_bytes),
        }
    y_ND, _ = dispatch(problem[0], routing, experts)
    results["parts"] = [count_live_passes(), torch.autograd.grad(y_ND.sum(), experts.fc2_EDF), count_live_passes()]
    results["after recomputation"] = count_living_after_recomputation(dispatch, problem[0], routing, experts, steps=3)
    return results


def count_live_passes():
    """Return the number of passes through experts whose objects are still in memory."""
    return sum(type(o) is InnerPass for o in gc.get_objects())


@pytest.fixture(scope="module")
def ranks():
    """Return the results of `results_of_rank` of each rank."""
    return run_ranks(RANKS, results_of_rank)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_one_process(ranks, name):
    assert_equal_to_one_process(CASES[name], [rank[name]["tensors"] for rank in ranks])


@pytest.mark.parametrize("name", CASES)
def test_dispatch_without_gradients_has_the_same_outputs_and_saves_nothing(ranks, name):
    for rank in ranks:
        y_ND, differentiable, saved_tensors, sent_bytes = rank[name]["without gradients"]
        assert torch.equal(y_ND, rank[name]["tensors"][0])
        assert (differentiable, saved_tensors) == (False, 0)
        assert sent_bytes.counts == rank[name]["sent"].counts
    forward = sum(rank[name]["without gradients"][3].rows for rank in ranks)
    assert sum(rank[name]["sent"].rows for rank in ranks) == 2 * forward


@pytest.mark.parametrize("name", CASES)
def test_only_necessary_rows_are_sent(ranks, name):
    assert sum(rank[name]["sent"].rows for rank in ranks) == sum(rank[name]["least"] for rank in ranks)
    assert all(rank[name]["sent"].counts == (RANKS - 1) * EXPERTS_PER_RANK * 8 for rank in ranks)
    has_remote_rows = sum(CASES[name].rows) and not CASES[name].is_local
    assert (sum(rank[name]["least"] for rank in ranks) > 0) == bool(has_remote_rows)


def test_the_backward_frees_its_tensors_while_the_loss_lives(ranks):
    for rank in ranks:
        previous_count, gradient, final_count = rank["parts"]
        assert (previous_count, final_count) == (2, 0)
        assert gradient[0].any()


def test_recomputed_steps_leave_nothing_behind(ranks):
    """Forward and recomputation have three passes each: of own rows, of received rows and of the shared expert."""
    assert [rank["after recomputation"] for rank in ranks] == [LivingObjects(0, 0, 3 * 2 * 3)] * RANKS


def test_each_remote_route_is_sent_as_a_row_four_times():
    count_LE = torch.tensor([[5, 3, 2, 1], [0, 7, 0, 4]])
    assert flat_row_bytes(count_LE, range(1, 3), row_bytes=10) == 4 * (5 + 1 + 0 + 4) * 10


def steps_with_a_slow_peer(path):
    """Run forward and backward with a shared expert on two ranks, and return the names of this rank's steps in order.

    Rank 1 starts an exchange only after rank 0 has done the step that must not wait for that exchange.
    """
    rank, case, steps = dist.get_rank(), Case(rows=(11, 7)), []
    store = dist.FileStore(str(path), 2)
    start, permute, run = dist.all_to_all_single, flat.permute, mhmoe_kernels.run_sorted_experts
    awaited_steps = iter(
        ["permuted", "own rows, forward", "shared expert, forward", "own rows, backward", "shared expert, backward"]
    )

    def record_step(step):
        steps.append(step)
        if rank == 0:
            store.set(step, "")

    def start_when_ready(*args, **kwargs):
        step = next(awaited_steps)
        if rank == 1:
            store.wait([step], timedelta(seconds=60))
        return start(*args, **kwargs)

    def permute_and_record(*args):
        result = permute(*args)
        record_step("permuted")
        return result

    def run_and_record(backend, x_RD, counts, weights):
        y_RD = run(backend, x_RD, counts, weights)
        owner = "own" if len(steps) == 1 else "their"
        record_step(f"{owner} rows, forward")
        x_RD.register_hook(lambda _: record_step(f"{owner} rows, backward"))
        return y_RD

    dist.all_to_all_single, flat.permute, flat.run_sorted_experts = start_when_ready, permute_and_record, run_and_record
    experts, *problem = build_problem(case, range(rank * 3, rank * 3 + 3), rank)
    layer = build_shared_layer(case)

    def compute_and_record(x, *weights, function=layer.function):
        record_step("shared expert, forward")
        x.register_hook(lambda _: record_step("shared expert, backward"))
        return function(x, *weights)

    layer.function = compute_and_record
    flat_dispatch = FlatDispatch(dist.group.WORLD)

    def dispatch(x_ND, routing, experts, shared):
        return sum(flat_dispatch(x_ND, routing, experts, SharedExpert(layer, x_ND))), None

    outputs_and_gradients(case, dispatch, experts, *problem)
    return steps


def test_a_rank_computes_what_it_has_while_rows_travel(tmp_path):
    """If rank 0 waited for the exchange first, rank 1 would wait for the step of rank 0 until its timeout."""
    for steps in run_ranks(2, steps_with_a_slow_peer, tmp_path / "store"):
        texts = ("own rows, {}", "their rows, {}", "shared expert, {}")
        assert steps == ["permuted", *(text.format(way) for way in ("forward", "backward") for text in texts)]
