"""Block sizes of the fused kernels for sm_90 (H100), by kind of expert, kernel, width of rows and dtype.

NOT MEASURED: the sizes are predicted, and the kernels have only been compiled with them.

A multiprocessor has 256 KiB of registers, at most 255 per thread, and 227 KiB of shared memory for a program. A program
holds these bytes, with R rows of width D and F hidden units per block, s stages, b bytes per element, and M matrices of
an expert (SwiGLU 3, GELU 2):

                      registers, float32               shared memory
    forward           4 R D + 4 (M - 1) R F            b R D + s M b F D
    backward_rows     4 R D + 4 M R F                  2 b R D + s M b F D
    backward_weights  4 M F D + 4 M R F                s 2 b R D + M b F D

For every block, a kernel reads its weights, or its rows, again from the L2 cache. In bfloat16, it computes this many
FLOP per byte of these reads: R in `forward`, 5/3 R (SwiGLU) or 5/4 R (GELU) in `backward_rows`, and M F in
`backward_weights`. An H100 needs about 145 (798 TFLOP/s over about 5.5 TB/s), so R should be 128 and F 64.
kernels/README.md has predicted times and the compiler's report.
"""

from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "backward_rows", "backward_weights"]


class Blocks(NamedTuple):
    """Rows and hidden units that a program holds at a time, its warps, and its pipeline stages."""

    rows: int
    hidden: int
    warps: int
    stages: int


# Keys of the inner tables are widths: an entry is for rows up to that width. Wider rows take more memory, so their
# blocks are smaller.
_BFLOAT16: dict[tuple[str, Kernel], dict[int, Blocks]] = {
    ("swiglu", "forward"): {
        128: Blocks(128, 64, 8, 3),
        192: Blocks(128, 64, 8, 2),
        256: Blocks(128, 32, 8, 2),
        384: Blocks(64, 32, 8, 2),
        1024: Blocks(16, 16, 8, 1),
    },
    ("swiglu", "backward_rows"): {
        192: Blocks(128, 32, 8, 2),
        256: Blocks(64, 32, 4, 2),
        384: Blocks(64, 16, 8, 2),
        1024: Blocks(16, 16, 8, 1),
    },
    ("swiglu", "backward_weights"): {
        128: Blocks(128, 32, 8, 2),
        256: Blocks(64, 32, 8, 2),
        384: Blocks(64, 16, 8, 1),
        1024: Blocks(16, 16, 8, 1),
    },
    ("gelu", "forward"): {
        128: Blocks(128, 64, 8, 3),
        192: Blocks(128, 32, 8, 3),
        256: Blocks(128, 32, 8, 2),
        384: Blocks(64, 32, 8, 2),
        1024: Blocks(16, 16, 8, 1),
    },
    ("gelu", "backward_rows"): {
        192: Blocks(128, 32, 8, 2),
        256: Blocks(64, 32, 4, 2),
        384: Blocks(64, 16, 8, 2),
        1024: Blocks(16, 16, 8, 1),
    },
    ("gelu", "backward_weights"): {
        128: Blocks(128, 32, 8, 2),
        256: Blocks(64, 32, 8, 2),
        384: Blocks(64, 16, 8, 2),
        1024: Blocks(16, 16, 8, 1),
    },
}
# Matrix units do not compute exact float32 products, so single threads multiply and add. Their operands fill the
# registers, so the blocks are the smallest ones.
_FLOAT32 = {1024: Blocks(16, 16, 8, 1)}


def blocks_for(kind: str, kernel: Kernel, width: int, dtype: torch.dtype) -> Blocks:
    """Return the block sizes of a fused kernel for rows of `width` values; ValueError if the chip cannot hold them."""
    table = _FLOAT32 if dtype == torch.float32 else _BFLOAT16[kind, kernel]
    for widest, blocks in table.items():
        if width <= widest:
            return blocks
    raise ValueError(
        f"rows of width {width} do not fit on a chip beside a fused expert's weights; the limit is {widest}: "
        "use the kernel 'grouped'"
    )
