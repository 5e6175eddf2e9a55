"""SwiGLU experts, down(silu(gate(x)) * up(x)), on sorted rows: forward, and gradients that recompute the hidden layer.

A program of `swiglu_forward` or `swiglu_backward_rows` holds BLOCK_R rows of one expert and walks over f; a program of
`swiglu_backward_weights` holds BLOCK_F hidden units of one expert and walks over its rows. Nothing of size R x F is
stored.
"""

import triton
import triton.language as tl

from mhmoe_kernels.triton.chunks import (
    add_into_width,
    add_outer,
    load_columns,
    load_rows,
    over_width,
    scale_rows,
    store_columns,
    store_rows,
    zeros_columns,
    zeros_rows,
)


@triton.jit
def swiglu_forward(
    x_ND, gate_EFD, up_EFD, down_EDF, row_R, expert_T, start_T, end_T, out_RD, F,
    D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert, start, end = tl.load(expert_T + tile), tl.load(start_T + tile), tl.load(end_T + tile)
    if start >= end:
        return
    slot = start + tl.arange(0, BLOCK_R)
    inside = slot < end
    x = load_rows(x_ND, tl.load(row_R + slot, mask=inside, other=0), inside, D, CHUNKS)
    matrix = expert * F * D
    out = zeros_rows(BLOCK_R, CHUNKS)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        a = over_width(x, load_rows(gate_EFD + matrix, f, f < F, D, CHUNKS), True)
        u = over_width(x, load_rows(up_EFD + matrix, f, f < F, D, CHUNKS), True)
        out = add_into_width(out, a * tl.sigmoid(a) * u, load_columns(down_EDF + matrix, f, F, False, D, CHUNKS), True)
    store_rows(out_RD, slot, inside, out, D, CHUNKS)


@triton.jit
def _gradients(a, u, dh):
    """Return h, and the gradients of the outputs of gate and up, from those outputs and the gradient of h."""
    s = tl.sigmoid(a)
    silu = a * s
    return silu * u, dh * u * (s + silu * (1 - s)), dh * silu


@triton.jit
def swiglu_backward_rows(
    x_ND, dy_ND, gate_EFD, up_EFD, down_EDF, row_R, scale_R, expert_T, start_T, end_T, dx_RD, dscale_R, F,
    D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert, start, end = tl.load(expert_T + tile), tl.load(start_T + tile), tl.load(end_T + tile)
    if start >= end:
        return
    slot = start + tl.arange(0, BLOCK_R)
    inside = slot < end
    row = tl.load(row_R + slot, mask=inside, other=0)
    x = load_rows(x_ND, row, inside, D, CHUNKS)
    dy = load_rows(dy_ND, row, inside, D, CHUNKS)
    matrix = expert * F * D
    dx = zeros_rows(BLOCK_R, CHUNKS)
    dscale = tl.zeros([BLOCK_R], tl.float32)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        gate = load_rows(gate_EFD + matrix, f, f < F, D, CHUNKS)
        up = load_rows(up_EFD + matrix, f, f < F, D, CHUNKS)
        dh = over_width(dy, load_columns(down_EDF + matrix, f, F, False, D, CHUNKS), False)
        h, da, du = _gradients(over_width(x, gate, True), over_width(x, up, True), dh)
        # <dy, down(h)> = <h, dh>: the routing weight's gradient without the expert's output.
        dscale += tl.sum(h * dh, 1)
        dx = add_into_width(add_into_width(dx, da, gate, False), du, up, False)
    scale = tl.load(scale_R + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
    store_rows(dx_RD, slot, inside, scale_rows(dx, scale), D, CHUNKS)
    tl.store(dscale_R + slot, dscale, mask=inside)


@triton.jit
def swiglu_backward_weights(
    x_ND, dy_ND, gate_EFD, up_EFD, down_EDF, row_R, scale_R, first_E1, dgate_EFD, dup_EFD, ddown_EDF, F,
    D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    expert = tl.program_id(1)
    matrix = expert.to(tl.int64) * F * D
    # Loaded as [D, F]: turned inside the loop, they would stay in registers and go through shared memory every time.
    gate = load_columns(gate_EFD + matrix, f, F, True, D, CHUNKS)
    up = load_columns(up_EFD + matrix, f, F, True, D, CHUNKS)
    down = load_columns(down_EDF + matrix, f, F, False, D, CHUNKS)
    # All three as [D, F], so that the matrix unit's M is the wide side.
    dgate, dup = zeros_columns(BLOCK_F, CHUNKS), zeros_columns(BLOCK_F, CHUNKS)
    ddown = zeros_columns(BLOCK_F, CHUNKS)
    end = tl.load(first_E1 + expert + 1)
    for start in range(tl.load(first_E1 + expert), end, BLOCK_R):
        slot = start + tl.arange(0, BLOCK_R)
        inside = slot < end
        row = tl.load(row_R + slot, mask=inside, other=0)
        x = load_rows(x_ND, row, inside, D, CHUNKS)
        dy = load_rows(dy_ND, row, inside, D, CHUNKS)
        scale = tl.load(scale_R + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
        h, da, du = _gradients(over_width(x, gate, False), over_width(x, up, False), over_width(dy, down, False))
        dgate = add_outer(dgate, x, da * scale)
        dup = add_outer(dup, x, du * scale)
        ddown = add_outer(ddown, dy, h * scale)
    store_columns(dgate_EFD + matrix, f, F, dgate, True, D, CHUNKS)
    store_columns(dup_EFD + matrix, f, F, dup, True, D, CHUNKS)
    store_columns(ddown_EDF + matrix, f, F, ddown, False, D, CHUNKS)
