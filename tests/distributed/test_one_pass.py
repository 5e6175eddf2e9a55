"""Tests of flat dispatch in one pass, by kernels in Triton's interpreter, against one process."""

import importlib.util
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from mhmoe_ray.bench.acceptance.accounting import Accounting
from mhmoe_ray.distributed.dispatch.exchange import PendingExchange, RowExchange, flat_row_bytes
from mhmoe_ray.distributed.dispatch.flat import FlatDispatch
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.model.recompute import recompute_in_backward
from mhmoe_ray.planner.kernels import DISPATCH
from mhmoe_ray.spec import ModelSpec
from tests.distributed.routed import (
    EXPERTS_PER_RANK,
    LAYOUTS,
    WIDTH,
    Case,
    LivingObjects,
    assert_equal_to_one_process,
    build_problem,
    count_living_after_recomputation,
    dispatch_of,
    outputs_and_gradients,
)
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.long,
]
RANKS = 4
SWIGLU = Case((11, 7, 9, 5), kernel="grouped_gemm", dtype=torch.float32)
SUBLN = (("backbone", "subln"),)
CASES = {
    "swiglu": SWIGLU,
    "gelu": SWIGLU._replace(model=SUBLN),
    "recomputed": SWIGLU._replace(recompute=1.0),
    "products of torch": SWIGLU._replace(kernel="grouped_mm", dtype=torch.bfloat16),
    "fused": SWIGLU._replace(kernel="triton"),
    "fused gelu": SWIGLU._replace(kernel="triton", model=SUBLN),
    "many choices": SWIGLU._replace(top_k=5),
    "no row at a rank": SWIGLU._replace(rows=(11, 0, 9, 5)),
    "no row anywhere": SWIGLU._replace(rows=(0, 0, 0, 0)),
    "all rows to one rank": SWIGLU._replace(used_experts=(2, 3)),
    "every row at home": SWIGLU._replace(used_experts=(0, 1), is_local=True),
    "some routes dropped": SWIGLU._replace(top_k=4, dropped=0.4),
    "all routes dropped": SWIGLU._replace(dropped=1.0),
    "shared expert": SWIGLU._replace(has_shared_expert=True),
    "autocast": SWIGLU._replace(autocast=True),
}
DISPATCHES = ["flat", *LAYOUTS]


def results_of_rank():
    """Return this rank's outputs and gradients of each dispatch and case, and further results of flat dispatch.

    They are its sent bytes, the least bytes, and the shapes of the tensors that its forward saves. The key "after
    recomputation" has the result of `count_living_after_recomputation`.
    """
    rank, results = dist.get_rank(), {}
    expert_ids = range(rank * EXPERTS_PER_RANK, (rank + 1) * EXPERTS_PER_RANK)
    dispatches = {name: dispatch_of("hierarchical", nodes) for name, nodes in LAYOUTS.items()}
    dispatches["flat"] = FlatDispatch(dist.group.WORLD)
    for name, case in CASES.items():
        for key, dispatch in dispatches.items():
            shapes = []

            def save(tensor, shapes=shapes):
                shapes.append(tuple(tensor.shape))
                return tensor

            experts, *problem = build_problem(case, expert_ids, rank)
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                results[key, name], routing = outputs_and_gradients(case, dispatch, experts, *problem)
        row_bytes = WIDTH * (2 if case.autocast else case.dtype.itemsize)
        least_bytes = flat_row_bytes(routing.count_E[None], expert_ids, row_bytes)
        results[name] = dispatch.pop_sent_bytes(), least_bytes, shapes
    results["after recomputation"] = [
        count_living_after_recomputation(dispatches[key], problem[0], routing, experts, steps=3)
        for key in ("flat", "2 nodes of 2")
    ]
    return results


@pytest.fixture(scope="module", autouse=True)
def _interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(scope="module")
def ranks():
    """Return the results of `results_of_rank` of each rank."""
    return run_ranks(RANKS, results_of_rank)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_one_process(ranks, dispatch, name):
    assert_equal_to_one_process(CASES[name], [rank[dispatch, name] for rank in ranks])


@pytest.mark.parametrize("name", CASES)
def test_only_necessary_rows_and_their_gates_are_sent(ranks, name):
    case, results = CASES[name], [rank[name] for rank in ranks]
    least_bytes = sum(rank_bytes for _, rank_bytes, _ in results)
    row_bytes = WIDTH * (2 if case.autocast else case.dtype.itemsize)
    # A row is sent four times. A gate and its gradient, in float32, are sent once each.
    expected_bytes = least_bytes + least_bytes // (4 * row_bytes) * 2 * 4
    assert sum(sent_bytes.rows for sent_bytes, _, _ in results) == expected_bytes
    assert all(sent_bytes.counts == (RANKS - 1) * EXPERTS_PER_RANK * 8 for sent_bytes, _, _ in results)


def test_outputs_of_experts_are_not_saved(ranks):
    for name in ("swiglu", "gelu", "fused"):
        # The only rows of the input's width that are saved are those that a rank's experts receive.
        shapes = [[shape for shape in rank[name][2] if shape[1:] == (WIDTH,) and shape[0] > 2] for rank in ranks]
        routes = sum(CASES[name].rows) * CASES[name].top_k
        assert [len(rows) for rows in shapes] == [1] * RANKS
        assert sum(rows[0][0] for rows in shapes) == routes


def test_recomputed_steps_leave_nothing_behind(ranks):
    """Forward and recomputation have two passes each: of all rows and of the shared expert."""
    expected = [LivingObjects(0, 0, 3 * 2 * 2)] * 2
    assert [rank["after recomputation"] for rank in ranks] == [expected] * RANKS


def counts_of_layer(heads, ep, recompute):
    """Return the kernels of a layer's forward and backward, its exchanges, and its tensors of all routes in float32.

    Kernels that read the exchanged counts are left out. The layer has random weights and computes in bfloat16.
    """
    moe = {"heads": heads, "experts": 4, "top_k": 2, "d_expert": 24, "every": 1, "kernel": "grouped_gemm"}
    spec = ModelSpec(vocab_size=1, d_model=32, layers=1, attention_heads=1, moe=moe)
    rank = dist.get_rank() if ep > 1 else 0
    module = MultiHeadMoE(spec, range(rank * 4 // ep, (rank + 1) * 4 // ep))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if ep > 1:
        module.dispatch = FlatDispatch(dist.group.WORLD)
    x_BTM = torch.randn(1, 12, 32).bfloat16().requires_grad_()
    exchanges = Counter()

    def count_and_start(exchange, count_JX, start=RowExchange.start_counts):
        exchanges["counts"] += 1
        return start(exchange, count_JX)

    # Other threads than this one do not have the mode that counts.
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autograd.set_multithreading_enabled(False),
        Accounting() as accounting,
    ):
        patch.setattr(RowExchange, "start_counts", count_and_start)
        with torch.autocast("cpu", torch.bfloat16):
            y_BTM, routing = recompute_in_backward(module, x_BTM) if recompute else module(x_BTM)
        outputs = y_BTM, routing.balance_loss, routing.z_loss
        # Triton's interpreter warns of infinite gradients. To fill them is no kernel of the layer.
        with _disable_current_modes():
            gradients = [torch.zeros_like(output) for output in outputs]
        torch.autograd.backward(outputs, gradients)
    exchanges["all"] = accounting.kernels.pop("alltoall_base_", 0)
    routes, width = 12 * heads * 2, 32 // heads
    wide = [
        shape
        for _, shape, dtype in accounting.shapes
        if dtype == torch.float32 and len(shape) == 2 and shape[0] > 12 * heads and shape[1] == width
    ]
    assert routes > 12 * heads
    return sum(accounting.kernels.values()) - accounting.kernels["cat"], exchanges, wide


PASSES = [(heads, recompute) for heads in (1, 2) for recompute in (False, True)]


def counts_of_rank():
    return [counts_of_layer(heads, dist.get_world_size(), recompute) for heads, recompute in PASSES]


def test_dispatch_launches_few_kernels_and_exchanges_counts_once():
    """The numbers of kernels do not depend on the sizes of a layer."""
    for results in run_ranks(2, counts_of_rank):
        for (heads, recompute), (kernels, exchanges, wide) in zip(PASSES, results, strict=True):
            local_kernels, no_exchanges, _ = counts_of_layer(heads, 1, recompute)
            assert no_exchanges["all"] == 0
            # Rows and gates are sent, and outputs return; gradients of outputs are sent, and those of rows and gates
            # return. A recomputed forward sends and returns again.
            assert exchanges == {"counts": 1, "all": 10 if recompute else 7}
            assert wide == []
            if recompute:
                assert kernels <= 1.3 * local_kernels
            else:
                assert kernels + exchanges["all"] + 1 - local_kernels == DISPATCH


def steps_of_rank():
    """Return the order in which this rank starts and ends exchanges and computes a shared expert."""
    steps, rank = [], dist.get_rank()
    case = SWIGLU._replace(rows=(11, 7), has_shared_expert=True)
    experts, *problem = build_problem(case, range(rank * EXPERTS_PER_RANK, (rank + 1) * EXPERTS_PER_RANK), rank)

    def record(step, function):
        def call(*arguments):
            steps.append(step)
            return function(*arguments)

        return call

    flat_dispatch = FlatDispatch(dist.group.WORLD)

    def dispatch(x_ND, routing, experts, shared):
        function = shared.layer.function

        def compute_and_record(x, *weights):
            steps.append("shared expert")
            x.register_hook(lambda _: steps.append("shared expert"))
            return function(x, *weights)

        shared.layer.function = compute_and_record
        return flat_dispatch(x_ND, routing, experts, shared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowExchange, "start_rows", record("start", RowExchange.start_rows))
        patch.setattr(PendingExchange, "wait", record("end", PendingExchange.wait))
        outputs_and_gradients(case, dispatch, experts, *problem)
    return steps


def test_a_shared_expert_is_computed_before_the_wait_for_rows():
    for steps in run_ranks(2, steps_of_rank):
        counts, back = ["end"], ["start", "end"]
        rows_and_gates = ["start", "start", "shared expert", "end", "end", *back]
        gradients = ["start", "shared expert", "end", "start", "start", "end", "end"]
        assert steps == [*counts, *rows_and_gates, *gradients]
