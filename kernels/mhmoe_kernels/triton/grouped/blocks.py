"""Block sizes of the grouped products.

NOT MEASURED: the sizes are predicted, and the kernels have only been compiled with them.

A product of a tile of rows and a block of columns reads rows + columns values for each of rows * columns sums, so
larger blocks read less. Compute capabilities 9 and 10 have room for 128 x 256 sums in registers or tensor memory, and
147 KiB of shared memory for three stages of their operands; all others spill registers at that size, and cards for
consumers have 99 KiB.
"""

from typing import NamedTuple

import torch

ROW_BLOCKS = (128, 64, 32, 16)
"""Rows of a tile, from the largest on; `rows_per_tile` chooses."""
_LARGE_MAJORS = (9, 10)


class ProductBlocks(NamedTuple):
    """Sizes of a tile of a product, the warps of a program, and the stages of its pipeline."""

    out: int
    """Columns of the result."""
    inner: int
    """Values that are multiplied at a time."""
    warps: int
    stages: int


def rows_per_tile(routes: int, experts: int) -> int:
    """Return the number of rows of a tile: the largest that is at most twice the mean number of rows of an expert.

    Args:
        routes: number of routes.
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
    """Return the blocks of `grouped_outer`: rows of the result, and its columns with the rows that are added at a time.

    Args:
        dtype: dtype of the operands.
        capability: compute capability without its dot.
    """
    if dtype == torch.float32:
        return 64, ProductBlocks(64, 16, 8, 2)
    return 128, ProductBlocks(256 if capability // 10 in _LARGE_MAJORS else 128, 64, 8, 3)
