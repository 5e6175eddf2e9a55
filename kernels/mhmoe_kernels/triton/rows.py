"""Kernels that gather rows in the order of experts, and add the expert outputs of each row, weighted by gates."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["R"])
def gather_rows(x_ND, route_R, x_RD, R, D: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy the row r // K of each route r, in the order of routes sorted by expert."""
    # The index is 64 bits wide, because the offset of a value may exceed 32 bits.
    slot = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (tl.load(route_R + slot, mask=slot < R, other=0) // K).to(tl.int64)
    mask = (slot < R)[:, None] & (column < D)[None, :]
    x = tl.load(x_ND + row[:, None] * D + column[None, :], mask=mask)
    tl.store(x_RD + slot[:, None] * D + column[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["N"])
def combine_rows(
    out_RD, second_RD, slot_NK, gate_NK, y_ND, N, D: tl.constexpr, K: tl.constexpr,
    HAS_SECOND: tl.constexpr, HAS_GATES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add each row's routes in float32, times their gates with HAS_GATES.

    With HAS_SECOND, the output of a route is the sum of its rows in `out_RD` and in `second_RD`.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = row < N
    mask = inside[:, None] & (column < D)[None, :]
    y = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slot_NK + row * K + k, mask=inside, other=0).to(tl.int64)
        value_offset = slot[:, None] * D + column[None, :]
        out = tl.load(out_RD + value_offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_SECOND:
            out += tl.load(second_RD + value_offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_GATES:
            out *= tl.load(gate_NK + row * K + k, mask=inside, other=0.0).to(tl.float32)[:, None]
        y += out
    tl.store(y_ND + row[:, None] * D + column[None, :], y.to(y_ND.dtype.element_ty), mask=mask)
