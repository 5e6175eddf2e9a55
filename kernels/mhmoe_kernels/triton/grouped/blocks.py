"""Block sizes of the kernels of grouped matrix products.

NOT MEASURED: the sizes are predicted, and the kernels have only been compiled with them.

A program computes a block of (rows x columns) sums of products. For each term of the sums it reads rows + columns
values, so larger blocks read less memory per sum. GPUs of compute capability 9 and 10 have room for 128 x 256 sums in
registers or tensor memory, and for three stages of their operands in shared memory, which take 147 KiB. All other GPUs
spill registers at that size, and consumer cards have only 99 KiB of shared memory.
"""

from typing import NamedTuple

import torch

ROW_BLOCKS = (128, 64, 32, 16)
"""Possible numbers of rows of a tile, the largest first. `rows_per_tile` chooses one of them."""
_LARGE_MAJORS = (9, 10)


class ProductBlocks(NamedTuple):
    """Block sizes of a matrix product, the number of warps of a program, and the stages of its pipeline."""

    out: int
    """Number of columns of the result that a program computes at a time."""
    inner: int
    """Number of values along the summed dimension that are multiplied at a time."""
    warps: int
    stages: int


def rows_per_tile(routes: int, experts: int) -> int:
    """Return the number of rows of a tile, which is one of `ROW_BLOCKS`.

    It is the largest one that is at most twice the mean number of rows of an expert, and otherwise the smallest one.

    Args:
        routes: number of routes, that is, of rows of all experts.
        experts: number of experts.
    """
    return next((rows for rows in ROW_BLOCKS if rows * experts <= 2 * routes), ROW_BLOCKS[-1])


def linear_blocks(rows: int, dtype: torch.dtype, capability: int) -> ProductBlocks:
    """Return the block sizes, warps and stages with which `grouped_linear` is launched for tiles of `rows` rows.

    Args:
        rows: number of rows of a tile.
        dtype: dtype of the operands.
        capability: compute capability without its dot, such as 90 for 9.0.
    """
    if dtype == torch.float32:
        # Matrix units do not compute exact float32 products, so single threads multiply and add.
        return ProductBlocks(64, 16, 8, 2)
    if rows == 128:
        return ProductBlocks(256 if capability // 10 in _LARGE_MAJORS else 128, 64, 8, 3)
    return ProductBlocks(128, 64, 4 if rows == 64 else 8, 3)


def outer_blocks(dtype: torch.dtype, capability: int) -> tuple[int, ProductBlocks]:
    """Return the block sizes of `grouped_outer`: the number of rows of a block of the result, and all other sizes.

    In the other sizes, `out` is the number of columns of that block, and `inner` is the number of routed rows whose
    products are added at a time.

    Args:
        dtype: dtype of the operands.
        capability: compute capability without its dot.
    """
    if dtype == torch.float32:
        return 64, ProductBlocks(64, 16, 8, 2)
    return 128, ProductBlocks(256 if capability // 10 in _LARGE_MAJORS else 128, 64, 8, 3)
