"""Tests of kernel `grouped` against kernel `reference`, and of `reference` against the formula of SwiGLU experts."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import (
    ExpertWeights,
    Gelu,
    GeluSubln,
    Swiglu,
    combine,
    permute,
    plan_routes,
    run_experts,
    run_sorted_experts,
)
from mhmoe_kernels.backends import BACKENDS
from mhmoe_kernels.grouped import pieces as grouped_pieces
from tests.kernels.problems import make_problem, outputs_and_gradients, with_gradients

permutation_module = importlib.import_module("mhmoe_kernels.permutation")
"""Module whose constants are patched; the package exports its functions only."""


def test_reference_computes_formula():
    x, expert, gate, w = make_problem(0, n=5, d=4, f=6, e=3, k=2)
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
    dtype=st.sampled_from([torch.float64, torch.float32]), function=st.sampled_from([Swiglu(), GeluSubln(), Gelu()]),
    recompute=st.sampled_from([0, 0.3, 0.5, 1]), piece=st.sampled_from([1, 3, 1024]), steps=st.sampled_from([1, 4, 32]),
    cached=st.sampled_from([8, 64, 1 << 17]),
)  # fmt: skip
def test_grouped_matches_reference_with_empty_experts(
    seed, n, e, data, dtype, function, recompute, piece, steps, cached
):
    """Outputs and gradients match for any share of recomputed rows.

    They also match for any size of the pieces into which an expert's rows are split, of the windows on which pieces are
    computed, and of the blocks that are to stay in the cache.
    """
    n_used = data.draw(st.integers(1, e), label="experts with rows")
    k = data.draw(st.integers(1, n_used), label="k")
    *routes, weights = make_problem(seed, n, d=8, f=6, e=e, k=k, dtype=dtype, n_used=n_used, function=function)
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-4}[dtype]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_pieces, "MAX_PIECE_ROWS", piece)
        patch.setattr(grouped_pieces, "WINDOW_STEPS", steps)
        patch.setattr(permutation_module, "CACHE_VALUES", cached)
        results = outputs_and_gradients("grouped", *routes, weights._replace(recompute=recompute))
    for actual, expected in zip(results, outputs_and_gradients("reference", *routes, weights), strict=True):
        assert actual.dtype == expected.dtype == dtype
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@given(
    counts=st.lists(st.integers(0, 3000), min_size=1, max_size=6), recompute=st.sampled_from([0, 0.4, 1]),
    rounded=st.booleans(), row_bytes=st.sampled_from([0, 1, 5000, 10**8]),
)  # fmt: skip
def test_pieces_cover_rows_of_each_expert_in_order(counts, recompute, rounded, row_bytes):
    """The pieces also recompute the given share of all rows, and respect the limits of rows and of cache bytes.

    The window of a piece, which may have rows after the piece, does not reach past the last row.
    """
    pieces, total = (
        grouped_pieces.split_into_pieces(counts, recompute, round_windows=rounded, row_bytes=row_bytes),
        sum(counts),
    )
    expert_of_row = [e for e, count in enumerate(counts) for _ in range(count)]
    assert [p.expert for p in pieces for _ in range(p.rows)] == expert_of_row
    assert [p.start for p in pieces] == [sum(p.rows for p in pieces[:i]) for i in range(len(pieces))]
    assert [p.expert for p in pieces if p.is_first] == [e for e, count in enumerate(counts) if count]
    assert sum(p.rows for p in pieces if not p.keeps_hidden) == round(recompute * total)
    assert all(p.rows <= grouped_pieces.MAX_PIECE_ROWS for p in pieces if not p.keeps_hidden or row_bytes)
    assert all(p.rows <= max(128, grouped_pieces.CACHE_BYTES / row_bytes) for p in pieces if row_bytes)
    for p in pieces:
        assert p.rows <= p.window_rows
        assert p.window.stop <= total
        assert rounded or p.window_rows == p.rows


def test_window_sizes_are_few():
    """The windows of 700 different row counts have at most 33 sizes, each with at most 4 % more rows than needed.

    A CPU's libraries compile a kernel for each number of rows, so few sizes mean few compilations.
    """
    shapes = {
        p.window_rows
        for n in range(700, 1400)
        for p in grouped_pieces.split_into_pieces([n, 5000], 0, round_windows=True)[:1]
    }
    assert len(shapes) <= 33
    assert all(
        p.window_rows <= 1.04 * n
        for n in range(1, 9000)
        for p in grouped_pieces.split_into_pieces([n, n], 0, round_windows=True)[:1]
    )


@pytest.mark.parametrize("backend", ["grouped", "reference"])
@pytest.mark.parametrize("count_E", [[3, 0, 4, 1], [0, 0, 0, 2], [0, 0, 0, 0]])
def test_sorted_rows_run_through_their_experts(backend, count_E):
    x, _, _, w = make_problem(4, n=sum(count_E), d=6, f=5, e=4, k=1)
    experts = (tuple(t[e] for t in w.stacked) for e in range(4))
    expected = torch.cat([Swiglu()(rows, *expert) for rows, expert in zip(x.split(count_E), experts, strict=True)])
    outputs = run_sorted_experts(backend, x, count_E, w)
    for actual, expected_result in zip(
        with_gradients(outputs, w.stacked), with_gradients(expected, w.stacked), strict=True
    ):
        torch.testing.assert_close(actual, expected_result)


@pytest.mark.parametrize("function", [Swiglu(), GeluSubln(), Gelu()])
@pytest.mark.parametrize("recompute", [0, 1])
def test_bfloat16_grouped_is_near_float64(function, recompute):
    """Outputs and gradients are near float64, also if an expert's rows pass in many pieces."""
    x, expert, gate, weights = make_problem(3, n=4000, d=16, f=256, e=2, k=1, dtype=torch.bfloat16, function=function)
    exact_tensors = [t.detach().double().requires_grad_() for t in (x, gate, *weights.stacked)]
    expected_results = outputs_and_gradients(
        "reference", exact_tensors[0], expert, exact_tensors[1], ExpertWeights(function, tuple(exact_tensors[2:]))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_pieces, "MAX_PIECE_ROWS", 128)
        results = outputs_and_gradients("grouped", x, expert, gate, weights._replace(recompute=recompute))
    for actual, expected in zip(results, expected_results, strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).norm() < 0.015 * expected.norm()


def test_accumulator_rounds_once_over_many_pieces():
    """The sum of 1000 ones in bfloat16 pieces is 1000, while a sum in bfloat16 would stop growing at 256."""
    one_11 = torch.ones(1, 1, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_pieces, "MAX_PIECE_ROWS", 1)
        pieces = grouped_pieces.split_into_pieces([1000], 1, round_windows=False)
        accumulator = grouped_pieces.GradientAccumulator(torch.empty(1, 1, 1, dtype=torch.bfloat16), pieces)
        for piece in pieces:
            accumulator.add(piece, one_11, one_11)
    assert accumulator.total_EOI.item() == 1000


@pytest.mark.parametrize("function", [Swiglu(), GeluSubln(), Gelu()])
def test_grouped_keeps_no_hidden_rows_without_backward(function, monkeypatch):
    """The kernel creates no piece that keeps its hidden rows under no_grad."""
    pieces = []
    monkeypatch.setattr(
        grouped_pieces.Piece,
        "__new__",
        lambda cls, *a, create=grouped_pieces.Piece.__new__: pieces.append(create(cls, *a)) or pieces[-1],
    )
    *routes, weights = make_problem(3, n=40, d=8, f=6, e=2, k=1, function=function)
    with torch.no_grad():
        run_experts("grouped", *routes, weights)
    assert pieces
    assert not any(piece.keeps_hidden for piece in pieces)


def test_permute_and_combine_gradients_match_finite_differences():
    x, expert, gate, _ = make_problem(1, n=6, d=3, f=2, e=4, k=2)
    plan = plan_routes(expert, 4)
    assert torch.autograd.gradcheck(lambda x: permute(x, plan), [x])
    out = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda out, gate: combine(out, gate, plan), [out, gate])


@pytest.mark.parametrize("n", [0, 1, 17])
def test_route_plan_sorts_by_expert_and_maps_slots_back_to_rows(n):
    expert = torch.rand(n, 5, generator=torch.Generator().manual_seed(n)).topk(3, dim=-1).indices
    plan = plan_routes(expert, 5)
    expert_of_slot = torch.empty(n * 3, dtype=torch.int64)
    expert_of_slot[plan.slot_NK.flatten()] = expert.flatten()
    assert torch.equal(expert_of_slot, expert_of_slot.sort().values)
    assert torch.equal(plan.row_R[plan.slot_NK], torch.arange(n)[:, None].expand(n, 3))
    assert plan.count_E.tolist() == [(expert == e).sum() for e in range(5)]


@pytest.mark.parametrize("function_name", ["run_experts", "run_sorted_experts"])
def test_backends_run_outside_autocast(function_name, monkeypatch):
    x, expert, gate, weights = make_problem(4, n=3, d=4, f=4, e=1, k=1)
    autocast_states = []

    def run(x, *_):
        autocast_states.append(torch.is_autocast_enabled("cpu"))
        return x

    monkeypatch.setitem(BACKENDS, "grouped", BACKENDS["grouped"]._replace(run=run, run_sorted=run))
    with torch.autocast("cpu", torch.bfloat16):
        if function_name == "run_experts":
            run_experts("grouped", x, expert, gate, weights)
        else:
            run_sorted_experts("grouped", x, [3], weights)
        assert torch.is_autocast_enabled("cpu")
    assert autocast_states == [False]


@pytest.mark.parametrize("function", [Swiglu(), GeluSubln()], ids=["swiglu", "gelu"])
@pytest.mark.parametrize("backend", ["reference", "grouped", "capacity", "triton"])
@torch.no_grad()
def test_autocast_changes_no_outputs(backend, function):
    """Autocast on CUDA would make a norm's output float32, which cannot be multiplied by bfloat16 weights."""
    x, expert, gate, weights = make_problem(4, n=8, d=16, f=16, e=3, k=2, dtype=torch.float32, function=function)
    expert_capacity = 8 if backend == "capacity" else None
    sorted_x, counts = permute(x, plan_routes(expert, 3)), expert.flatten().bincount(minlength=3).tolist()

    def outputs():
        yield run_experts(backend, x, expert, gate, weights, expert_capacity)
        if backend in ("grouped", "triton"):
            yield run_sorted_experts(backend, sorted_x, counts, weights)

    expected_outputs = list(outputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(actual, expected) for actual, expected in zip(outputs(), expected_outputs, strict=True))
