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


def linear_blocks(rows: int, dtype: torch.dtype, capability: int) -> ProductBlocks:
    """Return the block sizes of `grouped_linear`; `capability` has no dot, such as 90."""
    if dtype == torch.float32:
        # Matrix units do not compute exact float32 products, so single threads multiply and add.
        return ProductBlocks(64, 16, 8, 2)
    if rows == 128:
        return ProductBlocks(256 if capability // 10 in _LARGE_MAJORS else 128, 64, 8, 3)
    return ProductBlocks(128, 64, 4 if rows == 64 else 8, 3)


def outer_blocks(dtype: torch.dtype, capability: int) -> tuple[int, ProductBlocks]:
    """Return the rows of a block of `grouped_outer`'s result, and its other sizes.

    There, `out` is the columns of that block, and `inner` the routed rows whose products are added at a time.
    """
    if dtype == torch.float32:
        return 64, ProductBlocks(64, 16, 8, 2)
    return 128, ProductBlocks(256 if capability // 10 in _LARGE_MAJORS else 128, 64, 8, 3)
