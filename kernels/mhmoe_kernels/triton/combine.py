"""Weighted sum of the k routes of each row, in float32; without weights it is the backward of the gather of rows.

The gather of rows has no kernel of its own: the experts' kernels read x[row] themselves.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ROWS = 16


@triton.jit
def _combine(
    out_RD, slot_NK, gate_NK, y_ND, N, K: tl.constexpr, D: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The index is 64 bits wide, because the offset of an element, row * D, may exceed 32 bits.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = row < N
    mask = inside[:, None] & (col < D)[None, :]
    y = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slot_NK + row * K + k, mask=inside, other=0)
        out = tl.load(out_RD + slot[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            out *= tl.load(gate_NK + row * K + k, mask=inside, other=0.0).to(tl.float32)[:, None]
        y += out
    tl.store(y_ND + row[:, None] * D + col[None, :], y.to(y_ND.dtype.element_ty), mask=mask)


def combine(out_RD: Tensor, slot_NK: Tensor, gate_NK: Tensor | None) -> Tensor:
    """Return y_n = sum_k gate_nk * out[slot_nk], in the dtype of `out_RD`; a plain sum if `gate_NK` is None."""
    (N, K), D = slot_NK.shape, out_RD.shape[1]
    y_ND = out_RD.new_empty(N, D)
    # Padding the block to a power of two is free: the kernel is limited by memory bandwidth, and masked lanes move no
    # bytes.
    block = min(256, triton.next_power_of_2(D))
    # The kernel needs some pointer for the gates even if there are none, but reads it only if WEIGHTED.
    gates = out_RD if gate_NK is None else gate_NK
    _combine[(triton.cdiv(N, _BLOCK_ROWS), triton.cdiv(D, block))](
        out_RD, slot_NK, gates, y_ND, N, K, D, gate_NK is not None, _BLOCK_ROWS, block, enable_fp_fusion=True
    )
    return y_ND
