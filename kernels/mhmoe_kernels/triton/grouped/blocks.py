"""Block sizes of the grouped products and of the kernels around them.

NOT MEASURED: the sizes are predicted, and the kernels have only been compiled with them.
"""

from typing import NamedTuple

import torch

ROW_BLOCKS = (128, 64, 32, 16)
"""Rows of a tile, from the largest on; `rows_per_tile` chooses."""


class ProductBlocks(NamedTuple):
    """Sizes of a tile of a product, the warps of a program, and the stages of its pipeline."""

    out: int
    """Columns of the result."""
    inner: int
    """Values that are multiplied at a time."""
    warps: int
    stages: int


def rows_per_tile(routes: int, experts: int) -> int:
    """Return the number of rows of a tile, at most twice the mean number of rows of an expert if there are few.

    Args:
        routes: number of routes.
        experts: number of experts.
    """
    return next((rows for rows in ROW_BLOCKS if rows * experts <= 2 * routes), ROW_BLOCKS[-1])


def linear_blocks(rows: int, dtype: torch.dtype) -> ProductBlocks:
    """Return the blocks of `grouped_linear` for tiles of `rows` rows."""
    if dtype == torch.float32:
        # Matrix units do not compute exact float32 products, so single threads multiply and add.
        return ProductBlocks(64, 16, 8, 2)
    return ProductBlocks(128, 64, 8 if rows == 128 else 4, 3)


def outer_blocks(dtype: torch.dtype) -> tuple[int, ProductBlocks]:
    """Return the blocks of `grouped_outer`: rows of the result, and columns, rows that are summed at a time, warps and
    stages."""
    if dtype == torch.float32:
        return 64, ProductBlocks(64, 16, 8, 2)
    return 128, ProductBlocks(128, 64, 8, 3)
