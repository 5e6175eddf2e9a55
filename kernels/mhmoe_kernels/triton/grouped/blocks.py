"""Block sizes of the kernels of grouped matrix products.

NOT MEASURED: the sizes are predicted, and the kernels have only been compiled with them.

A program computes a block of (rows x columns) sums of products and reads rows + columns values for each term, so larger
blocks read less memory per sum. GPUs of compute capability 9 and 10 have room for 128 x 256 sums in registers or tensor
memory, and for three stages of their operands in shared memory, which take 147 KiB. All other GPUs spill registers at
that size, and consumer cards have only 99 KiB of shared memory.
"""

from typing import NamedTuple

import torch

ROW_BLOCKS = (128, 64, 32, 16)
"""Possible numbers of rows of a tile, the largest first."""
_LARGE_MAJORS = (9, 10)


class ProductBlocks(NamedTuple):
    """Block sizes of a matrix product, the warps of a program, and its pipeline stages."""

    out: int
    """Columns of the result that a program computes at a time."""
    inner: int
    """Values along the summed dimension that are multiplied at a time."""
    warps: int
    stages: int


def rows_per_tile(routes: int, experts: int) -> int:
    """Return the largest of `ROW_BLOCKS` that is at most twice an expert's mean number of rows, or the smallest one."""
    return next((rows for rows in ROW_BLOCKS if rows * experts <= 2 * routes), ROW_BLOCKS[-1])


def column_block(width: int, largest: int) -> int:
    """Return the columns of a block, 64 to `largest`, for a result of `width` columns."""
    block = largest
    for smaller_block in (128, 64):
        # A smaller block reads more for each sum. So it is chosen only if it saves an eighth of the computed columns.
        columns, smaller_columns = (-(-width // b) * b for b in (block, smaller_block))
        if smaller_block < block and 8 * smaller_columns <= 7 * columns:
            block = smaller_block
    return block


def _largest_block(capability: int) -> int:
    return 256 if capability // 10 in _LARGE_MAJORS else 128


def linear_blocks(rows: int, width: int, dtype: torch.dtype, capability: int) -> ProductBlocks:
    """Return the block sizes of `grouped_linear` for `width` columns; `capability` has no dot, such as 90."""
    if dtype == torch.float32:
        # Matrix units do not compute exact float32 products, so single threads multiply and add.
        return ProductBlocks(64, 16, 8, 2)
    largest = _largest_block(capability) if rows == 128 else 128
    return ProductBlocks(column_block(width, largest), 64, 4 if rows == 64 else 8, 3)


def outer_blocks(rows: int, width: int, dtype: torch.dtype, capability: int) -> tuple[int, ProductBlocks]:
    """Return the rows of a block of `grouped_outer`'s result, which has `rows` x `width` values, and its other sizes.

    There, `out` is the columns of that block, and `inner` the routed rows whose products are added at a time.
    """
    if dtype == torch.float32:
        return 64, ProductBlocks(64, 16, 8, 2)
    columns = column_block(width, _largest_block(capability))
    return column_block(rows, 128), ProductBlocks(columns, 64, 8, 3)
