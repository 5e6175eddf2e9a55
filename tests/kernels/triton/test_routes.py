"""Tests of the order of routes and of the moves of rows."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_kernels import combine, plan_routes
from tests.kernels.triton.problems import DEVICE

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.long,
    # The tests also run without a GPU, in Triton's interpreter.
    pytest.mark.gpu,
]


def sorted_routes(expert_NK, experts, rows_per_tile):
    from mhmoe_kernels.triton.operators import SortedRoutes, sort_routes

    return SortedRoutes(*sort_routes(expert_NK.to(DEVICE), experts, rows_per_tile))


def covered_slots(routes, rows_per_tile):
    """Return (slot, expert) for each slot of each tile, where all slots of a tile have the expert of the tile."""
    offsets, slots = routes.offset_E1.tolist(), []
    for expert, start in zip(routes.expert_T.tolist(), routes.start_T.tolist(), strict=True):
        if expert < len(offsets) - 1:
            slots += [(slot, expert) for slot in range(start, min(start + rows_per_tile, offsets[expert + 1]))]
    return slots


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20), n=st.integers(0, 400), experts=st.sampled_from([1, 2, 5, 17, 40]),
    k=st.integers(1, 3), rows_per_tile=st.sampled_from([16, 32, 128]),
)  # fmt: skip
def test_sort_is_that_of_torch(seed, n, experts, k, rows_per_tile):
    """Routes are sorted as `plan_routes` sorts them, also if they fill several blocks, and each tile has one expert."""
    generator = torch.Generator().manual_seed(seed)
    # The cube makes some experts much more frequent than others.
    expert_NK = (torch.rand(n, k, generator=generator) ** 3 * experts).long()
    routes, plan = sorted_routes(expert_NK, experts, rows_per_tile), plan_routes(expert_NK, experts)
    assert torch.equal(routes.route_R.cpu() // k, plan.row_R)
    assert torch.equal(routes.slot_NK.cpu(), plan.slot_NK)
    assert torch.equal(routes.offset_E1.diff().cpu(), plan.count_E)
    expert_of_slot = expert_NK.flatten().sort(stable=True).values.tolist()
    assert covered_slots(routes, rows_per_tile) == list(enumerate(expert_of_slot))


@settings(deadline=None, max_examples=15)
@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=9), rows_per_tile=st.sampled_from([16, 32, 64]))
def test_tiles_of_counts_cover_each_row_once(counts, rows_per_tile):
    from mhmoe_kernels.triton.operators import SortedRoutes, schedule_tiles

    count_E = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    offset_E1, *tiles = schedule_tiles(count_E, sum(counts), rows_per_tile)
    assert offset_E1.tolist() == [0, *count_E.cumsum(0).tolist()]
    expert_of_slot = [expert for expert, count in enumerate(counts) for _ in range(count)]
    routes = SortedRoutes(count_E, count_E, offset_E1, *tiles)
    assert covered_slots(routes, rows_per_tile) == list(enumerate(expert_of_slot))


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**20), ranks=st.integers(1, 4), experts=st.integers(1, 5),
    largest_count=st.sampled_from([0, 3, 700]), rows_per_tile=st.sampled_from([16, 32, 64]),
)  # fmt: skip
def test_rows_of_several_ranks_are_sorted_like_routes(seed, ranks, experts, largest_count, rows_per_tile):
    from mhmoe_kernels.triton.operators import SortedRoutes, sort_received

    generator = torch.Generator().manual_seed(seed)
    received_PX = torch.randint(0, largest_count + 1, (ranks, experts), generator=generator)
    expert_N1 = torch.arange(experts).repeat(ranks).repeat_interleave(received_PX.flatten())[:, None]
    routes = SortedRoutes(*sort_received(received_PX.to(DEVICE), len(expert_N1), rows_per_tile))
    expected = sorted_routes(expert_N1, experts, rows_per_tile)
    used_tiles = int((expected.expert_T < experts).sum())
    for tensor, expected_tensor in zip(routes[:3], expected[:3], strict=True):
        assert torch.equal(tensor, expected_tensor)
    assert torch.equal(routes.expert_T, expected.expert_T)
    assert torch.equal(routes.start_T[:used_tiles], expected.start_T[:used_tiles])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), n=st.integers(0, 40), d=st.sampled_from([8, 24, 48, 300]), k=st.integers(1, 3))
def test_rows_are_gathered_and_combined_as_torch_does(seed, n, d, k):
    from mhmoe_kernels.triton.operators import combine_rows, gather_rows

    generator = torch.Generator().manual_seed(seed)
    expert_NK = torch.rand(n, 5, generator=generator).topk(k, dim=-1).indices
    routes, plan = sorted_routes(expert_NK, 5, 16), plan_routes(expert_NK.to(DEVICE), 5)
    x_ND, gate_NK = (torch.randn(n, width, generator=generator).to(DEVICE) for width in (d, k))
    x_RD = gather_rows(x_ND, routes.route_R, k)
    assert torch.equal(x_RD, x_ND[plan.row_R])
    torch.testing.assert_close(combine_rows(x_RD, None, routes.slot_NK, gate_NK), combine(x_RD, gate_NK, plan))
    # Without gates, `combine_rows` is the gradient of `gather_rows`: it adds the gradients of the routes of each row.
    torch.testing.assert_close(combine_rows(x_RD, None, routes.slot_NK, None), x_RD[plan.slot_NK].sum(1))
    sums = combine_rows(x_RD, 2 * x_RD, routes.slot_NK, None)
    torch.testing.assert_close(sums, 3 * x_RD[plan.slot_NK].sum(1))


@given(st.integers(1, 2000))
def test_chunks_are_powers_of_two_with_little_padding(width):
    from mhmoe_kernels.triton.fused.chunks import chunk_widths

    chunks = chunk_widths(width)
    assert all(16 <= c <= 256 and c & (c - 1) == 0 for c in chunks)
    assert 0 <= sum(chunks) - width < 16
