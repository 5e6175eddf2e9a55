"""Kernels that sort routes by expert and divide them into tiles: a stable counting sort on the device.

A tile is up to BLOCK_ROWS sorted routes of one expert. The host knows only how many tiles there can be at most, so it
never waits for the counts. The sort takes four launches for any number of experts, and two for rows that other ranks
have sorted, `place_received` and `schedule_tiles`:

    count_routes        counts of each expert in each block of routes
    add_counts          counts in earlier blocks, and the total of each expert
    schedule_tiles      first sorted route of each expert, and the tiles
    place_routes        position of each route
    place_received      position of each received row, and the total of each expert
"""

import triton
import triton.language as tl

ROUTES_PER_BLOCK = 256
"""Routes that one program counts and places, comparing each with all others."""


@triton.jit
def _load_experts(expert_NK, index, R, E: tl.constexpr, K: tl.constexpr, BY_CHOICE: tl.constexpr):
    """Load the expert of each route in `index`, or E past the last route.

    With BY_CHOICE, all first choices come before all second ones, else routes are numbered row by row.
    """
    route = index % (R // K) * K + index // (R // K) if BY_CHOICE else index
    return tl.load(expert_NK + route, mask=index < R, other=E).to(tl.int32)


@triton.jit(do_not_specialize=["R"])
def count_routes(
    expert_NK, count_BE, R, E: tl.constexpr, K: tl.constexpr, BY_CHOICE: tl.constexpr,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Store how many routes of a block go to each of E experts. BINS, a power of two, is larger than E."""
    block = tl.program_id(0)
    # Routes past the end count for an extra bin of the histogram, which is not stored.
    expert = _load_experts(expert_NK, block * BLOCK + tl.arange(0, BLOCK), R, E, K, BY_CHOICE)
    bin_ = tl.arange(0, BINS)
    tl.store(count_BE + block * E + bin_, tl.histogram(expert, BINS), mask=bin_ < E)


@triton.jit(do_not_specialize=["B"])
def add_counts(count_BE, before_BE, total_E, B, E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """Store each expert's routes in earlier blocks, for each block, and its total."""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, B, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        count_offset = block[:, None] * E + expert[None, :]
        mask = (block < B)[:, None] & (expert < E)[None, :]
        count = tl.load(count_BE + count_offset, mask=mask, other=0)
        tl.store(before_BE + count_offset, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    tl.store(total_E + expert, total, mask=expert < E)


@triton.jit(do_not_specialize=["T"])
def schedule_tiles(
    total_E, offset_E1, expert_T, start_T, T, E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Store the expert and the first sorted route of each tile; the expert E marks a tile that is not needed.

    The first program also stores the offsets of all experts. BLOCK_E is a power of two, at least E.
    """
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    total = tl.load(total_E + expert, mask=expert < E, other=0)
    end = tl.cumsum(total, 0)
    if program == 0:
        tl.store(offset_E1 + expert + 1, end, mask=expert < E)
        tl.store(offset_E1 + expert, end - total, mask=expert == 0)
    tiles = (total + BLOCK_ROWS - 1) // BLOCK_ROWS
    last_tile = tl.cumsum(tiles, 0)
    tile = program * BLOCK_T + tl.arange(0, BLOCK_T)
    # True for the experts whose tiles all come before this tile.
    is_before = (last_tile[None, :] <= tile[:, None]) & (expert < E)[None, :]
    tile_expert = tl.sum(is_before.to(tl.int32), 1)
    first_tile = tl.sum(tl.where(is_before, tiles[None, :], 0), 1)
    first_route = tl.sum(tl.where(is_before, total[None, :], 0), 1)
    tl.store(expert_T + tile, tile_expert, mask=tile < T)
    tl.store(start_T + tile, first_route + (tile - first_tile) * BLOCK_ROWS, mask=tile < T)


@triton.jit(do_not_specialize=["R"])
def place_routes(
    expert_NK, before_BE, offset_E1, route_R, slot_R, R, E: tl.constexpr, K: tl.constexpr, BY_CHOICE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the position of each route of a block in the sorted order, and the route at each position."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    route = block * BLOCK + lane
    inside = route < R
    expert = _load_experts(expert_NK, route, R, E, K, BY_CHOICE)
    # The experts are loaded a second time, as the other side of a comparison of all pairs: Triton has no transposed
    # view of a vector.
    other_expert = _load_experts(expert_NK, route, R, E, K, BY_CHOICE)
    is_earlier = (other_expert[None, :] == expert[:, None]) & (lane[None, :] < lane[:, None])
    rank = tl.sum(is_earlier.to(tl.int32), 1)
    slot = tl.load(offset_E1 + expert, mask=inside, other=0) + rank
    slot += tl.load(before_BE + block * E + expert, mask=inside, other=0)
    tl.store(slot_R + route, slot, mask=inside)
    tl.store(route_R + slot, route, mask=inside)


@triton.jit
def place_received(
    received_PX, route_R, slot_R, total_E, X: tl.constexpr, PX: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_PX: tl.constexpr,
):  # fmt: skip
    """Store the position by expert of each row that P ranks sent, the row at each position, and each expert's total.

    Rows arrive by rank, and those of one rank by expert; X experts are on this rank. The programs of a row of the grid
    share the rows of one rank for one expert. BLOCK_PX is a power of two, at least PX = P * X.
    """
    run = tl.program_id(0)
    expert = run % X
    other_run = tl.arange(0, BLOCK_PX)
    other_expert = other_run % X
    count = tl.load(received_PX + other_run, mask=other_run < PX, other=0).to(tl.int32)
    row = tl.sum(tl.where(other_run < run, count, 0))
    is_earlier = (other_expert < expert) | ((other_expert == expert) & (other_run < run))
    slot = tl.sum(tl.where(is_earlier, count, 0))
    rows = tl.sum(tl.where(other_run == run, count, 0))
    if run < X and tl.program_id(1) == 0:
        tl.store(total_E + expert, tl.sum(tl.where(other_expert == expert, count, 0)))
    for start in range(tl.program_id(1) * BLOCK, rows, tl.num_programs(1) * BLOCK):
        lane = start + tl.arange(0, BLOCK)
        tl.store(route_R + slot + lane, row + lane, mask=lane < rows)
        tl.store(slot_R + row + lane, slot + lane, mask=lane < rows)
