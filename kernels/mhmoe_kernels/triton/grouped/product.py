"""Persistent kernels of grouped matrix products: rows times the matrix of their expert, and the gradients of matrices.

A fixed number of programs takes one tile after another, so one launch computes all experts, however many rows each has.
Widths are constants of a kernel, so that the compiler knows which loads are aligned: 856 is not a multiple of 16, but
its rows are multiples of 16 bytes. The numbers of rows and tiles change all the time and must not cause a new
compilation (`do_not_specialize`).

    grouped_linear   y_r = x_r @ w_e^T, or x_r @ w_e, for the rows r of each expert e
    grouped_outer    dw_e = sum over the rows r of expert e of a_r^T b_r
"""

import triton
import triton.language as tl

from mhmoe_kernels.triton.functions import dot


@triton.jit
def _add_product(
    sums, x_RI, w_EMN, row, expert, column, IN: tl.constexpr, OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_IN: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """Return sums + x[row] @ w[expert][:, column], or with w[expert][column]^T if TRANSPOSED.

    The sums are float32 [rows, columns]; `row` and `expert` are 64 bits wide. IS_EVEN says that BLOCK_IN divides IN.
    """
    inner = tl.arange(0, BLOCK_IN)
    x = x_RI + row[:, None] * IN + inner[None, :]
    # Columns outside the matrix are masked, not clamped: a clamp along the contiguous dimension would hide from the
    # compiler that neighbouring columns are neighbours in memory, and it would load them one by one.
    is_column = (column < OUT)[None, :]
    if TRANSPOSED:
        w = w_EMN + expert * OUT * IN + column[None, :] * IN + inner[:, None]
    else:
        w = w_EMN + expert * OUT * IN + inner[:, None] * OUT + column[None, :]
    for start_index in range(0, IN, BLOCK_IN):
        # Pointers that the loop increments would take NVIDIA's assembler 18 instead of 0.4 seconds.
        x_block, w_block = x + start_index, w + (start_index if TRANSPOSED else start_index * OUT)
        if IS_EVEN:
            sums = dot(tl.load(x_block), tl.load(w_block, mask=is_column, other=0.0), sums)
        else:
            is_inside = start_index + inner < IN
            a = tl.load(x_block, mask=is_inside[None, :], other=0.0)
            sums = dot(a, tl.load(w_block, mask=is_inside[:, None] & is_column, other=0.0), sums)
    return sums


@triton.jit(do_not_specialize=["T", "P"])
def grouped_linear(
    x_RI, w_EMN, x2_RI, w2_EMN, bias_EO, known_PO, y_RO, offset_E1, expert_T, start_T, T, P,
    IN: tl.constexpr, OUT: tl.constexpr, E: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KNOWN_ROWS: tl.constexpr,
    IS_EVEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Compute y: each row of x times the matrix of its expert, plus x2 times w2 with HAS_SECOND.

    With HAS_KNOWN_ROWS, the first P rows of y are known. They are copied from `known_PO`, except in a tile that also
    has unknown rows, where all rows are computed.
    """
    out_blocks = tl.cdiv(OUT, BLOCK_OUT)
    for tile in range(tl.program_id(0), T * out_blocks, tl.num_programs(0)):
        # The tiles of the same rows follow each other, so that the rows stay in the L2 cache. So do the tiles of an
        # expert, so that its matrix stays there.
        rows_tile = tile // out_blocks
        expert = tl.load(expert_T + rows_tile).to(tl.int64)
        if expert < E:
            end = tl.load(offset_E1 + expert + 1)
            row = tl.load(start_T + rows_tile) + tl.arange(0, BLOCK_ROWS)
            column = (tile % out_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            # In place of rows past the end of the expert, its last row is read, so that loads need no mask for rows.
            # The results for these rows are not stored.
            source_row = tl.minimum(row, end - 1).to(tl.int64)
            mask = (row < end)[:, None] & (column < OUT)[None, :]
            value_offset = row.to(tl.int64)[:, None] * OUT + column[None, :]
            if HAS_KNOWN_ROWS and tl.max(tl.where(row < end, row, 0)) < P:
                tl.store(y_RO + value_offset, tl.load(known_PO + value_offset, mask=mask), mask=mask)
            else:
                sums = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
                sums = _add_product(
                    sums, x_RI, w_EMN, source_row, expert, column, IN, OUT, TRANSPOSED, BLOCK_IN, IS_EVEN
                )
                if HAS_SECOND:
                    sums = _add_product(
                        sums, x2_RI, w2_EMN, source_row, expert, column, IN, OUT, TRANSPOSED, BLOCK_IN, IS_EVEN
                    )
                if HAS_BIAS:
                    bias = tl.load(bias_EO + expert * OUT + column, mask=column < OUT, other=0.0)
                    sums += bias.to(tl.float32)[None, :]
                tl.store(y_RO + value_offset, sums.to(y_RO.dtype.element_ty), mask=mask)


@triton.jit
def grouped_outer(
    a_RO, b_RI, dw_EOI, offset_E1, OUT: tl.constexpr, IN: tl.constexpr, E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Compute dw, the gradient of each expert's matrix: the sum of a_r^T b_r over its rows r, or 0 without rows."""
    out_blocks, in_blocks = tl.cdiv(OUT, BLOCK_OUT), tl.cdiv(IN, BLOCK_IN)
    for tile in range(tl.program_id(0), E * out_blocks * in_blocks, tl.num_programs(0)):
        expert = tile // (out_blocks * in_blocks)
        out = (tile // in_blocks) % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        in_ = tile % in_blocks * BLOCK_IN + tl.arange(0, BLOCK_IN)
        start, end = tl.load(offset_E1 + expert), tl.load(offset_E1 + expert + 1)
        sums = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for start_index in range(start, end, BLOCK_ROWS):
            row = start_index + tl.arange(0, BLOCK_ROWS)
            is_inside, wide_row = row < end, row.to(tl.int64)
            a = tl.load(
                a_RO + wide_row[None, :] * OUT + out[:, None],
                mask=is_inside[None, :] & (out < OUT)[:, None],
                other=0.0,
            )
            b = tl.load(
                b_RI + wide_row[:, None] * IN + in_[None, :],
                mask=is_inside[:, None] & (in_ < IN)[None, :],
                other=0.0,
            )
            sums = dot(a, b, sums)
        mask = (out < OUT)[:, None] & (in_ < IN)[None, :]
        dw = dw_EOI + expert.to(tl.int64) * OUT * IN + out[:, None] * IN + in_[None, :]
        tl.store(dw, sums.to(dw_EOI.dtype.element_ty), mask=mask)
