"""Rows that cross between processes to their experts, against all of them in one process."""

import gc
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import mhmoe_kernels
from mhmoe_ray.distributed.dispatch import flat
from mhmoe_ray.distributed.dispatch.exchange import least_sent
from mhmoe_ray.distributed.dispatch.flat import FlatDispatch
from tests.distributed.routed import HELD, WIDTH, Case, assert_those_of_one_process, made, outputs_and_gradients
from tests.ranks import run_ranks

RANKS = 3

CASES = {
    "swiglu": Case(),
    "gelu": Case(model=(("backbone", "subln"),)),
    "recomputed": Case(kernel="grouped", recompute=1.0),
    "kernel without sorted rows": Case(kernel="reference"),
    "many choices": Case(top_k=5),
    "no row at a rank": Case(rows=(11, 0, 9)),
    "no row anywhere": Case(rows=(0, 0, 0)),
    "an expert without rows": Case(only=(0, 1, 2, 4, 5)),
    "all rows to one rank": Case(only=(2, 3)),
    "all rows of a gelu to one rank": Case(only=(2, 3), model=(("backbone", "subln"),)),
    "every row at home": Case(only=(0, 1), own=True),
    "some routes dropped": Case(dropped=0.4),
    "all in bfloat16": Case(dtype=torch.bfloat16),
    "autocast": Case(dtype=torch.float32, autocast=True),
    "autocast of a gelu": Case(dtype=torch.float32, autocast=True, model=(("backbone", "subln"),)),
}


def on_a_rank():
    """Return for each case outputs and gradients, outputs without gradients, and what was sent; for the last also the
    parts that are alive."""
    rank, results = dist.get_rank(), {}
    held = range(rank * HELD, (rank + 1) * HELD)
    for name, case in CASES.items():
        through = FlatDispatch(dist.group.WORLD)
        experts, *problem = made(case, held, rank)
        tensors, routing = outputs_and_gradients(case, through, experts, *problem)
        sent = through.pop_sent()
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t)
        with torch.no_grad(), hooks, torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            alone = through(problem[0], routing, experts)
        row_bytes = WIDTH * (2 if case.autocast else case.dtype.itemsize)
        results[name] = {
            "tensors": tensors,
            "without gradients": (alone, alone.requires_grad, len(kept), through.pop_sent()),
            "sent": sent,
            "least": least_sent(routing.count_E[None], held, row_bytes),
        }
    y_ND = through(problem[0], routing, experts)
    results["parts"] = [parts_alive(), torch.autograd.grad(y_ND.sum(), experts.fc2_EDF), parts_alive()]
    return results


def parts_alive():
    return sum(isinstance(o, flat._Part) for o in gc.get_objects() if type(o).__module__ == flat.__name__)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(RANKS, on_a_rank)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_one_process(ranks, name):
    assert_those_of_one_process(CASES[name], [rank[name]["tensors"] for rank in ranks])


@pytest.mark.parametrize("name", CASES)
def test_without_gradients_it_gives_the_same_and_keeps_nothing(ranks, name):
    for rank in ranks:
        y_ND, differentiable, kept, sent = rank[name]["without gradients"]
        assert torch.equal(y_ND, rank[name]["tensors"][0])
        assert (differentiable, kept) == (False, 0)
        assert sent.counts == rank[name]["sent"].counts
    forward = sum(rank[name]["without gradients"][3].rows for rank in ranks)
    assert sum(rank[name]["sent"].rows for rank in ranks) == 2 * forward


@pytest.mark.parametrize("name", CASES)
def test_no_row_travels_that_need_not(ranks, name):
    assert sum(rank[name]["sent"].rows for rank in ranks) == sum(rank[name]["least"] for rank in ranks)
    assert all(rank[name]["sent"].counts == (RANKS - 1) * HELD * 8 for rank in ranks)
    crossing = sum(CASES[name].rows) and not CASES[name].own
    assert (sum(rank[name]["least"] for rank in ranks) > 0) == bool(crossing)


def test_the_backward_frees_what_it_used_while_the_loss_lives(ranks):
    for rank in ranks:
        before, gradient, after = rank["parts"]
        assert (before, after) == (2, 0)
        assert gradient[0].any()


def test_what_must_be_sent_is_a_row_for_each_route_elsewhere_four_times():
    count_LE = torch.tensor([[5, 3, 2, 1], [0, 7, 0, 4]])
    assert least_sent(count_LE, range(1, 3), row_bytes=10) == 4 * (5 + 1 + 0 + 4) * 10


def a_peer_that_lags(path):
    """Let rank 1 start each exchange only when rank 0 has done what should need nothing of it; return the order of a
    rank's steps."""
    rank, case, steps = dist.get_rank(), Case(rows=(11, 7)), []
    store = dist.FileStore(str(path), 2)
    start, permute, run = dist.all_to_all_single, flat.permute, mhmoe_kernels.run_sorted_experts
    before = iter(
        ["permuted", "own rows, forward", "their rows, forward", "own rows, backward", "their rows, backward"]
    )

    def done(step):
        steps.append(step)
        if rank == 0:
            store.set(step, "")

    def started(*args, **kwargs):
        step = next(before)
        # What goes back needs the rows of the other rank first.
        if rank == 1 and "their" not in step:
            store.wait([step], timedelta(seconds=60))
        return start(*args, **kwargs)

    def permuted(*args):
        result = permute(*args)
        done("permuted")
        return result

    def ran(backend, x_RD, counts, weights):
        y_RD = run(backend, x_RD, counts, weights)
        whose = "own" if len(steps) == 1 else "their"
        done(f"{whose} rows, forward")
        x_RD.register_hook(lambda _: done(f"{whose} rows, backward"))
        return y_RD

    dist.all_to_all_single, flat.permute, flat.run_sorted_experts = started, permuted, ran
    experts, *problem = made(case, range(rank * 3, rank * 3 + 3), rank)
    outputs_and_gradients(case, FlatDispatch(dist.group.WORLD), experts, *problem)
    return steps


def test_a_rank_works_on_its_own_rows_while_the_others_rows_are_not_there(tmp_path):
    """A rank that did not would wait forever, and the other rank's wait would end in an error."""
    for steps in run_ranks(2, a_peer_that_lags, tmp_path / "store"):
        own, their = "own rows, {}", "their rows, {}"
        assert steps == ["permuted", *(text.format(way) for way in ("forward", "backward") for text in (own, their))]
