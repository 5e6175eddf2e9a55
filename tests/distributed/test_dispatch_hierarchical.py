"""Rows that cross between made-up nodes once each, against all experts in one process, and their cost in bytes."""

import pytest
import torch
import torch.distributed as dist

from mhmoe_ray.distributed.build import build_dispatch
from mhmoe_ray.distributed.dispatch.flat import FlatDispatch
from mhmoe_ray.distributed.dispatch.hierarchical import HierarchicalDispatch
from mhmoe_ray.distributed.mesh import build_mesh
from tests.distributed.routed import HELD, WIDTH, Case, assert_those_of_one_process, made, outputs_and_gradients
from tests.ranks import run_ranks
from tests.specs import tiny_spec

RANKS = 4
ROWS = (11, 7, 9, 5)
LAYOUTS = {"2 nodes of 2": list("aabb"), "4 nodes of 1": list("abcd")}
CASES = {
    "one choice": Case(ROWS, top_k=1),
    "two choices": Case(ROWS, top_k=2),
    "four choices": Case(ROWS, top_k=4),
    "all experts chosen": Case(ROWS, top_k=8),
    "float32": Case(ROWS, top_k=4, dtype=torch.float32),
    "gelu": Case(ROWS, model=(("backbone", "subln"),)),
    "no row at a rank": Case((11, 0, 9, 5)),
    "no row at a node": Case((0, 0, 9, 5)),
    "no row anywhere": Case((0, 0, 0, 0)),
    "all rows to one node": Case(ROWS, only=(4, 5, 6, 7)),
    "all rows to one rank": Case(ROWS, only=(2, 3)),
    "every row at home": Case(ROWS, only=(0, 1), own=True),
    "some routes dropped": Case(ROWS, top_k=4, dropped=0.4),
    "all routes dropped": Case(ROWS, dropped=1.0),
    "all in bfloat16": Case(ROWS, dtype=torch.bfloat16),
    "autocast": Case(ROWS, dtype=torch.float32, autocast=True),
    "autocast of a gelu": Case(ROWS, dtype=torch.float32, autocast=True, model=(("backbone", "subln"),)),
}


def dispatch_of(dispatch, nodes):
    spec = tiny_spec(cluster={"workers": len(nodes), "ep": len(nodes), "dispatch": dispatch}).cluster
    return build_dispatch(spec, build_mesh(spec, nodes, "cpu"))


def on_a_rank():
    """Return for each layout and case outputs and gradients, outputs without gradients, what was sent, and the
    routes."""
    rank, results = dist.get_rank(), {}
    for layout, nodes in LAYOUTS.items():
        hierarchical, plain = dispatch_of("hierarchical", nodes), dispatch_of("flat", nodes)
        assert isinstance(hierarchical, HierarchicalDispatch)
        for name, case in CASES.items():
            experts, *problem = made(case, range(rank * HELD, (rank + 1) * HELD), rank)
            tensors, routing = outputs_and_gradients(case, hierarchical, experts, *problem)
            sent = hierarchical.pop_sent()
            kept = []
            hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t)
            with torch.no_grad(), hooks, torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                alone = hierarchical(problem[0], routing, experts)
            outputs_and_gradients(case, plain, experts, *problem)
            results[layout, name] = {
                "tensors": tensors,
                "without gradients": (alone, alone.requires_grad, len(kept)),
                "sent": sent,
                "sent flat": plain.pop_sent(),
                "routes": routing.expert_NK.masked_fill(routing.gate_NK == 0, -1).tolist(),
            }
            hierarchical.pop_sent()
    results["no grid"] = [type(dispatch_of("hierarchical", nodes)) for nodes in ("aaaa", "aaab", "abba")]
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(RANKS, on_a_rank)


every_case = pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in LAYOUTS for name in CASES])


@every_case
def test_outputs_and_gradients_are_those_of_one_process(ranks, layout, name):
    assert_those_of_one_process(CASES[name], [rank[layout, name]["tensors"] for rank in ranks])


@every_case
def test_without_gradients_it_gives_the_same_and_keeps_nothing(ranks, layout, name):
    for rank in ranks:
        y_ND, differentiable, kept = rank[layout, name]["without gradients"]
        assert torch.equal(y_ND, rank[layout, name]["tensors"][0])
        assert (differentiable, kept) == (False, 0)


@every_case
def test_a_row_crosses_once_to_each_node_that_has_experts_for_it(ranks, layout, name):
    case, nodes = CASES[name], LAYOUTS[layout]
    row_bytes = WIDTH * (2 if case.autocast else case.dtype.itemsize)
    # There and back, twice; gates there and back, and numbers of experts there.
    beside = case.top_k * (2 * torch.promote_types(case.dtype, torch.float32).itemsize + 4)
    local = RANKS // len(set(nodes))
    crossing = between = far_routes = far_ranks = 0
    for rank, found in enumerate(ranks):
        for experts in found[layout, name]["routes"]:
            owners = [e // HELD for e in experts if e >= 0]
            crossing += len({nodes[owner] for owner in owners} - {nodes[rank]})
            # A row comes in at the rank of the sender's place, and goes on to the owner if that is another.
            between += sum(owner % local != rank % local for owner in owners)
            far_routes += sum(nodes[owner] != nodes[rank] for owner in owners)
            far_ranks += sum(owner != rank for owner in owners)
    sent, sent_flat = ([rank[layout, name][key] for rank in ranks] for key in ("sent", "sent flat"))
    assert sum(s.between_nodes for s in sent) == crossing * (4 * row_bytes + beside)
    assert sum(s.rows - s.between_nodes for s in sent) == between * 4 * row_bytes
    assert sum(s.between_nodes for s in sent_flat) == far_routes * 4 * row_bytes
    assert sum(s.rows for s in sent_flat) == far_ranks * 4 * row_bytes


def test_a_group_within_a_node_or_unequally_spread_stays_flat(ranks):
    assert [rank["no grid"] for rank in ranks] == [[FlatDispatch] * 3] * RANKS
