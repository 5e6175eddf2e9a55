"""`grouped` against `reference`, which a test of its own compares with the formula."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import (
    ExpertWeights,
    GeluSubln,
    Swiglu,
    combine,
    grouped,
    permute,
    plan_routes,
    run_experts,
    run_sorted_experts,
)
from mhmoe_kernels.backends import BACKENDS
from tests.kernels.problems import outputs_and_gradients, problem, with_gradients

permuting = importlib.import_module("mhmoe_kernels.permutation")
"""The module of permutations itself, for patching its constants; the package exports its functions only."""


def test_reference_is_the_formula():
    x, expert, gate, w = problem(0, n=5, d=4, f=6, e=3, k=2)
    gate_EFD, up_EFD, down_EDF = w.stacked
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for n in range(5):
        for k in range(2):
            e = int(expert[n, k])
            hidden = F.silu(gate_EFD[e] @ x[n]) * (up_EFD[e] @ x[n])
            expected[n] += gate[n, k] * (down_EDF[e] @ hidden)
    torch.testing.assert_close(run_experts("reference", x, expert, gate, w), expected)


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**20), n=st.integers(0, 40), e=st.integers(1, 9), data=st.data(),
    dtype=st.sampled_from([torch.float64, torch.float32]), function=st.sampled_from([Swiglu(), GeluSubln()]),
    recompute=st.sampled_from([0, 0.3, 0.5, 1]), piece=st.sampled_from([1, 3, 1024]), steps=st.sampled_from([1, 4, 32]),
    cached=st.sampled_from([8, 64, 1 << 17]),
)  # fmt: skip
def test_grouped_agrees_with_reference_with_empty_experts_among_them(
    seed, n, e, data, dtype, function, recompute, piece, steps, cached
):
    only = data.draw(st.integers(1, e), label="experts with rows")
    k = data.draw(st.integers(1, only), label="k")
    *routes, weights = problem(seed, n, d=8, f=6, e=e, k=k, dtype=dtype, only=only, function=function)
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-4}[dtype]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "PIECE", piece)
        patch.setattr(grouped, "STEPS", steps)
        patch.setattr(permuting, "CACHED", cached)
        found = outputs_and_gradients("grouped", *routes, weights._replace(recompute=recompute))
    for ours, oracle in zip(found, outputs_and_gradients("reference", *routes, weights), strict=True):
        assert ours.dtype == oracle.dtype == dtype
        torch.testing.assert_close(ours, oracle, atol=tolerance, rtol=tolerance)


@given(
    counts=st.lists(st.integers(0, 3000), min_size=1, max_size=6), recompute=st.sampled_from([0, 0.4, 1]),
    rounded=st.booleans(), row_bytes=st.sampled_from([0, 1, 5000, 10**8]),
)  # fmt: skip
def test_pieces_cover_each_experts_rows_in_order(counts, recompute, rounded, row_bytes):
    found, total = grouped.pieces(counts, recompute, rounded=rounded, row_bytes=row_bytes), sum(counts)
    owner = [e for e, count in enumerate(counts) for _ in range(count)]
    assert [p.expert for p in found for _ in range(p.rows)] == owner
    assert [p.start for p in found] == [sum(p.rows for p in found[:i]) for i in range(len(found))]
    assert [p.expert for p in found if p.first] == [e for e, count in enumerate(counts) if count]
    assert sum(p.rows for p in found if not p.kept) == round(recompute * total)
    assert all(p.rows <= grouped.PIECE for p in found if not p.kept or row_bytes)
    assert all(p.rows <= max(128, grouped.CACHE / row_bytes) for p in found if row_bytes)
    for p in found:
        assert p.rows <= p.room
        assert p.window.stop <= total
        assert rounded or p.room == p.rows


def test_numbers_of_rows_are_few():
    """A CPU compiles kernels for each number of rows."""
    shapes = {p.room for n in range(700, 1400) for p in grouped.pieces([n, 5000], 0, rounded=True)[:1]}
    assert len(shapes) <= 33
    assert all(p.room <= 1.04 * n for n in range(1, 9000) for p in grouped.pieces([n, n], 0, rounded=True)[:1])


@pytest.mark.parametrize("backend", ["grouped", "reference"])
@pytest.mark.parametrize("count_E", [[3, 0, 4, 1], [0, 0, 0, 2], [0, 0, 0, 0]])
def test_sorted_rows_go_through_the_experts_they_are_counted_for(backend, count_E):
    x, _, _, w = problem(4, n=sum(count_E), d=6, f=5, e=4, k=1)
    experts = (tuple(t[e] for t in w.stacked) for e in range(4))
    expected = torch.cat([Swiglu()(rows, *expert) for rows, expert in zip(x.split(count_E), experts, strict=True)])
    found = run_sorted_experts(backend, x, count_E, w)
    for ours, oracle in zip(with_gradients(found, w.stacked), with_gradients(expected, w.stacked), strict=True):
        torch.testing.assert_close(ours, oracle)


@pytest.mark.parametrize("function", [Swiglu(), GeluSubln()])
@pytest.mark.parametrize("recompute", [0, 1])
def test_grouped_in_bfloat16_is_near_float64(function, recompute):
    """Outputs and gradients are near, also where rows go through an expert in many pieces."""
    x, expert, gate, weights = problem(3, n=4000, d=16, f=256, e=2, k=1, dtype=torch.bfloat16, function=function)
    exact = [t.detach().double().requires_grad_() for t in (x, gate, *weights.stacked)]
    oracles = outputs_and_gradients("reference", exact[0], expert, exact[1], ExpertWeights(function, tuple(exact[2:])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "PIECE", 128)
        found = outputs_and_gradients("grouped", x, expert, gate, weights._replace(recompute=recompute))
    for ours, oracle in zip(found, oracles, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - oracle).norm() < 0.015 * oracle.norm()


def test_sums_over_many_pieces_are_not_rounded_in_between():
    """A sum of ones in bfloat16 would stop growing at 256."""
    total = grouped.SumOfProducts(torch.empty(1, 1, 1, dtype=torch.bfloat16))
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "PIECE", 1)
        for piece in grouped.pieces([1000], 1, rounded=False):
            total.add(piece, one, one)
    assert total.total_EOI.item() == 1000


@pytest.mark.parametrize("function", [Swiglu(), GeluSubln()])
def test_grouped_keeps_no_hidden_rows_where_there_is_no_backward(function, monkeypatch):
    seen = []
    monkeypatch.setattr(
        grouped.Piece, "__new__", lambda cls, *a, new=grouped.Piece.__new__: seen.append(new(cls, *a)) or seen[-1]
    )
    *routes, weights = problem(3, n=40, d=8, f=6, e=2, k=1, function=function)
    with torch.no_grad():
        run_experts("grouped", *routes, weights)
    assert seen
    assert not any(piece.kept for piece in seen)


def test_permute_and_combine_have_the_gradients_of_finite_differences():
    x, expert, gate, _ = problem(1, n=6, d=3, f=2, e=4, k=2)
    plan = plan_routes(expert, 4)
    assert torch.autograd.gradcheck(lambda x: permute(x, plan), [x])
    out = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda out, gate: combine(out, gate, plan), [out, gate])


@pytest.mark.parametrize("n", [0, 1, 17])
def test_a_plan_sorts_routes_by_expert_and_leads_back(n):
    expert = torch.rand(n, 5, generator=torch.Generator().manual_seed(n)).topk(3, dim=-1).indices
    plan = plan_routes(expert, 5)
    by_slot = torch.empty(n * 3, dtype=torch.int64)
    by_slot[plan.slot_NK.flatten()] = expert.flatten()
    assert torch.equal(by_slot, by_slot.sort().values)
    assert torch.equal(plan.row_R[plan.slot_NK], torch.arange(n)[:, None].expand(n, 3))
    assert plan.count_E.tolist() == [(expert == e).sum() for e in range(5)]


@pytest.mark.parametrize("ask", ["run_experts", "run_sorted_experts"])
def test_no_backend_runs_within_autocast_of_the_caller(ask, monkeypatch):
    x, expert, gate, weights = problem(4, n=3, d=4, f=4, e=1, k=1)
    seen = []

    def run(x, *_):
        seen.append(torch.is_autocast_enabled("cpu"))
        return x

    monkeypatch.setitem(BACKENDS, "grouped", BACKENDS["grouped"]._replace(run=run, run_sorted=run))
    with torch.autocast("cpu", torch.bfloat16):
        if ask == "run_experts":
            run_experts("grouped", x, expert, gate, weights)
        else:
            run_sorted_experts("grouped", x, [3], weights)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


@pytest.mark.parametrize("function", [Swiglu(), GeluSubln()], ids=["swiglu", "gelu"])
@pytest.mark.parametrize("backend", ["reference", "grouped", "padded", "capacity", "triton"])
@torch.no_grad()
def test_autocast_of_the_caller_changes_nothing(backend, function):
    """Autocast on CUDA would make a norm's output float32, which no product takes beside bfloat16 weights."""
    x, expert, gate, weights = problem(4, n=8, d=16, f=16, e=3, k=2, dtype=torch.float32, function=function)
    places = 8 if backend == "capacity" else None
    sorted_x, counts = permute(x, plan_routes(expert, 3)), expert.flatten().bincount(minlength=3).tolist()

    def outputs():
        yield run_experts(backend, x, expert, gate, weights, places)
        if backend in ("grouped", "triton"):
            yield run_sorted_experts(backend, sorted_x, counts, weights)

    plain = list(outputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(ours, one) for ours, one in zip(outputs(), plain, strict=True))
