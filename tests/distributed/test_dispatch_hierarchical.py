"""Tests of the results of hierarchical dispatch between simulated nodes, and of the numbers of bytes that it sends."""

import pytest
import torch
import torch.distributed as dist

from mhmoe_ray.distributed.dispatch.exchange import PendingExchange
from mhmoe_ray.distributed.dispatch.flat import FlatDispatch
from mhmoe_ray.distributed.dispatch.hierarchical import HierarchicalDispatch
from mhmoe_ray.model.feedforward import SharedExpert
from tests.distributed.routed import (
    EXPERTS_PER_RANK,
    LAYOUTS,
    WIDTH,
    Case,
    LivingObjects,
    assert_equal_to_one_process,
    build_problem,
    build_shared_layer,
    count_living_after_recomputation,
    dispatch_of,
    outputs_and_gradients,
)
from tests.support.ranks import run_ranks

RANKS = 4
ROWS = (11, 7, 9, 5)
CASES = {
    "one choice": Case(ROWS, top_k=1),
    "two choices": Case(ROWS, top_k=2),
    "four choices": Case(ROWS, top_k=4),
    "all experts chosen": Case(ROWS, top_k=8),
    "float32": Case(ROWS, top_k=4, dtype=torch.float32),
    "gelu": Case(ROWS, model=(("backbone", "subln"),)),
    "shared expert": Case(ROWS, has_shared_expert=True),
    "shared expert of a gelu": Case(ROWS, has_shared_expert=True, model=(("backbone", "subln"),)),
    "no row at a rank": Case((11, 0, 9, 5)),
    "no row at a node": Case((0, 0, 9, 5)),
    "no row anywhere": Case((0, 0, 0, 0)),
    "all rows to one node": Case(ROWS, used_experts=(4, 5, 6, 7)),
    "all rows to one rank": Case(ROWS, used_experts=(2, 3)),
    "every row at home": Case(ROWS, used_experts=(0, 1), is_local=True),
    "some routes dropped": Case(ROWS, top_k=4, dropped=0.4),
    "all routes dropped": Case(ROWS, dropped=1.0),
    "all in bfloat16": Case(ROWS, dtype=torch.bfloat16),
    "autocast": Case(ROWS, dtype=torch.float32, autocast=True),
    "autocast of a gelu": Case(ROWS, dtype=torch.float32, autocast=True, model=(("backbone", "subln"),)),
}


def results_of_rank():
    """Return this rank's results for each layout of nodes and each case.

    They are the outputs and gradients of hierarchical dispatch, its output when gradients are disabled, the bytes that
    hierarchical and flat dispatch send, and the routes. The key "no grid" has the types of dispatch of three groups:
    on one node, on two nodes with unequal numbers of ranks, and with ranks that are not in the order of nodes. The key
    "after recomputation" has the result of `count_living_after_recomputation`.
    """
    rank, results = dist.get_rank(), {}
    for layout, nodes in LAYOUTS.items():
        hierarchical, flat = dispatch_of("hierarchical", nodes), dispatch_of("flat", nodes)
        assert isinstance(hierarchical, HierarchicalDispatch)
        for name, case in CASES.items():
            experts, *problem = build_problem(case, range(rank * EXPERTS_PER_RANK, (rank + 1) * EXPERTS_PER_RANK), rank)
            tensors, routing = outputs_and_gradients(case, hierarchical, experts, *problem)
            sent_bytes = hierarchical.pop_sent_bytes()
            saved_tensors = []
            hooks = torch.autograd.graph.saved_tensors_hooks(saved_tensors.append, lambda t: t)
            with torch.no_grad(), hooks, torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                shared = SharedExpert(build_shared_layer(case), problem[0]) if case.has_shared_expert else None
                output, shared_output = hierarchical(problem[0], routing, experts, shared)
                output = output if shared_output is None else output + shared_output
            outputs_and_gradients(case, flat, experts, *problem)
            results[layout, name] = {
                "tensors": tensors,
                "without gradients": (output, output.requires_grad, len(saved_tensors)),
                "sent": sent_bytes,
                "sent flat": flat.pop_sent_bytes(),
                "routes": routing.expert_NK.masked_fill(routing.gate_NK == 0, -1).tolist(),
            }
            hierarchical.pop_sent_bytes()
    results["after recomputation"] = count_living_after_recomputation(
        hierarchical, problem[0], routing, experts, steps=3
    )
    results["no grid"] = [type(dispatch_of("hierarchical", nodes)) for nodes in ("aaaa", "aaab", "abba")]
    return results


@pytest.fixture(scope="module")
def ranks():
    """Return the results of `results_of_rank` of each rank."""
    return run_ranks(RANKS, results_of_rank)


every_case = pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in LAYOUTS for name in CASES])


@every_case
def test_outputs_and_gradients_are_those_of_one_process(ranks, layout, name):
    assert_equal_to_one_process(CASES[name], [rank[layout, name]["tensors"] for rank in ranks])


@every_case
def test_dispatch_without_gradients_has_the_same_outputs_and_saves_nothing(ranks, layout, name):
    for rank in ranks:
        y_ND, differentiable, saved_tensors = rank[layout, name]["without gradients"]
        assert torch.equal(y_ND, rank[layout, name]["tensors"][0])
        assert (differentiable, saved_tensors) == (False, 0)


def test_recomputed_steps_leave_nothing_behind(ranks):
    assert [rank["after recomputation"] for rank in ranks] == [LivingObjects(0, 0, 3 * 2 * 3)] * RANKS


@every_case
def test_a_row_crosses_once_to_each_node_that_has_experts_for_it(ranks, layout, name):
    case, nodes = CASES[name], LAYOUTS[layout]
    row_bytes = WIDTH * (2 if case.autocast else case.dtype.itemsize)
    # Beside the row, a node gets the row's gates and expert ids (int32), and returns the gradients of the gates. The
    # row itself goes there and back in the forward pass and again in the backward pass.
    extra_bytes = case.top_k * (2 * torch.promote_types(case.dtype, torch.float32).itemsize + 4)
    ranks_per_node = RANKS // len(set(nodes))
    node_crossings = rank_crossings = far_routes = far_ranks = 0
    for rank, results in enumerate(ranks):
        for experts in results[layout, name]["routes"]:
            owners = [e // EXPERTS_PER_RANK for e in experts if e >= 0]
            node_crossings += len({nodes[owner] for owner in owners} - {nodes[rank]})
            # A row arrives at the rank that has the sender's position on that node. It is sent on if its expert is on
            # another rank.
            rank_crossings += sum(owner % ranks_per_node != rank % ranks_per_node for owner in owners)
            far_routes += sum(nodes[owner] != nodes[rank] for owner in owners)
            far_ranks += sum(owner != rank for owner in owners)
    sent_bytes, flat_bytes = ([rank[layout, name][key] for rank in ranks] for key in ("sent", "sent flat"))
    assert sum(s.between_nodes for s in sent_bytes) == node_crossings * (4 * row_bytes + extra_bytes)
    assert sum(s.rows - s.between_nodes for s in sent_bytes) == rank_crossings * 4 * row_bytes
    assert sum(s.between_nodes for s in flat_bytes) == far_routes * 4 * row_bytes
    assert sum(s.rows for s in flat_bytes) == far_ranks * 4 * row_bytes


def test_a_group_within_a_node_or_unequally_spread_stays_flat(ranks):
    assert [rank["no grid"] for rank in ranks] == [[FlatDispatch] * 3] * RANKS


def steps_of_rank():
    """Return the order in which this rank starts and ends exchanges between nodes and computes a shared expert."""
    case, rank, steps = Case(ROWS), dist.get_rank(), []
    hierarchical = dispatch_of("hierarchical", LAYOUTS["4 nodes of 1"])
    experts, *problem = build_problem(case, range(rank * EXPERTS_PER_RANK, (rank + 1) * EXPERTS_PER_RANK), rank)
    layer = build_shared_layer(case)

    def compute_and_record(x, *weights, function=layer.function):
        steps.append("shared expert")
        x.register_hook(lambda _: steps.append("shared expert"))
        return function(x, *weights)

    def start_and_record(*arguments, start=hierarchical._rail.start_rows):
        steps.append("start")
        return start(*arguments)

    def wait_and_record(pending, wait=PendingExchange.wait):
        result = wait(pending)
        # An exchange within a node has no work to wait for here, because each node has one rank.
        if pending.work:
            steps.append("end")
        return result

    layer.function, hierarchical._rail.start_rows, PendingExchange.wait = (
        compute_and_record,
        start_and_record,
        wait_and_record,
    )

    def dispatch(x_ND, routing, experts, shared):
        return sum(hierarchical(x_ND, routing, experts, SharedExpert(layer, x_ND))), None

    outputs_and_gradients(case, dispatch, experts, *problem)
    return steps


def test_a_shared_expert_is_computed_while_rows_cross_between_nodes():
    for steps in run_ranks(RANKS, steps_of_rank):
        counts, exchange, overlapped_exchange = ["end"], ["start", "end"], ["start", "shared expert", "end"]
        assert steps == [*counts, *overlapped_exchange, *exchange, *exchange, *overlapped_exchange]
