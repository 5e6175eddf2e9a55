"""SwiGLU experts, down(silu(gate(x)) * up(x)), on sorted rows: forward, and gradients that recompute the hidden layer.

A program of `swiglu_forward` or `swiglu_backward_rows` holds BLOCK_R rows of one expert and loops over the expert's
hidden units f. A program of `swiglu_backward_weights` holds BLOCK_F hidden units of one expert and loops over the
expert's rows. No kernel stores values of size R x F.
"""

import triton
import triton.language as tl

from mhmoe_kernels.triton.fused.chunks import (
    add_matmul,
    add_outer,
    load_columns,
    load_rows,
    matmul,
    scale_rows,
    store_columns,
    store_rows,
    zeros_columns,
    zeros_rows,
)


@triton.jit
def swiglu_forward(
    x_ND, gate_EFD, up_EFD, down_EDF, route_R, offset_E1, expert_T, start_T, out_RD,
    F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # Indices are 64 bits wide, because the offset of a value may exceed 32 bits.
    expert = tl.load(expert_T + tl.program_id(0)).to(tl.int64)
    if expert >= E:
        return
    slot = tl.load(start_T + tl.program_id(0)).to(tl.int64) + tl.arange(0, BLOCK_R)
    inside = slot < tl.load(offset_E1 + expert + 1)
    row = (tl.load(route_R + slot, mask=inside, other=0) // K).to(tl.int64)
    x = load_rows(x_ND, row, inside, D, CHUNKS)
    matrix = expert * F * D
    out = zeros_rows(BLOCK_R, CHUNKS)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        a = matmul(x, load_rows(gate_EFD + matrix, f, f < F, D, CHUNKS), True)
        u = matmul(x, load_rows(up_EFD + matrix, f, f < F, D, CHUNKS), True)
        out = add_matmul(out, a * tl.sigmoid(a) * u, load_columns(down_EDF + matrix, f, F, False, D, CHUNKS), True)
    store_rows(out_RD, slot, inside, out, D, CHUNKS)


@triton.jit
def _swiglu_gradients(a, u, dh):
    """Return h = silu(a) * u and the gradients of a and u, from gate's output a, up's output u, and h's gradient dh."""
    s = tl.sigmoid(a)
    silu = a * s
    return silu * u, dh * u * (s + silu * (1 - s)), dh * silu


@triton.jit
def swiglu_backward_rows(
    x_ND, dy_ND, gate_EFD, up_EFD, down_EDF, route_R, scale_S, offset_E1, expert_T, start_T, dx_RD, dscale_S,
    F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # Indices are 64 bits wide, because the offset of a value may exceed 32 bits.
    expert = tl.load(expert_T + tl.program_id(0)).to(tl.int64)
    if expert >= E:
        return
    slot = tl.load(start_T + tl.program_id(0)).to(tl.int64) + tl.arange(0, BLOCK_R)
    inside = slot < tl.load(offset_E1 + expert + 1)
    route = tl.load(route_R + slot, mask=inside, other=0)
    row = (route // K).to(tl.int64)
    x = load_rows(x_ND, row, inside, D, CHUNKS)
    dy = load_rows(dy_ND, row, inside, D, CHUNKS)
    matrix = expert * F * D
    dx = zeros_rows(BLOCK_R, CHUNKS)
    dscale = tl.zeros([BLOCK_R], tl.float32)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        gate_chunks = load_rows(gate_EFD + matrix, f, f < F, D, CHUNKS)
        up_chunks = load_rows(up_EFD + matrix, f, f < F, D, CHUNKS)
        dh = matmul(dy, load_columns(down_EDF + matrix, f, F, False, D, CHUNKS), False)
        h, da, du = _swiglu_gradients(matmul(x, gate_chunks, True), matmul(x, up_chunks, True), dh)
        # Because <dy, down(h)> = <h, dh>, the gradient of the route's gate does not need the expert's output.
        dscale += tl.sum(h * dh, 1)
        dx = add_matmul(add_matmul(dx, da, gate_chunks, False), du, up_chunks, False)
    scale = tl.load(scale_S + route, mask=inside, other=0.0).to(tl.float32)[:, None]
    store_rows(dx_RD, slot, inside, scale_rows(dx, scale), D, CHUNKS)
    tl.store(dscale_S + route, dscale, mask=inside)


@triton.jit
def swiglu_backward_weights(
    x_ND, dy_ND, gate_EFD, up_EFD, down_EDF, route_R, scale_S, offset_E1, dgate_EFD, dup_EFD, ddown_EDF,
    F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    expert = tl.program_id(1)
    # The offset is computed in 64 bits, because it may exceed 32 bits.
    matrix = expert.to(tl.int64) * F * D
    # The weights are loaded as [D, F]. If they were transposed inside the loop instead, they would stay in registers
    # and pass through shared memory in every iteration.
    gate_chunks = load_columns(gate_EFD + matrix, f, F, True, D, CHUNKS)
    up_chunks = load_columns(up_EFD + matrix, f, F, True, D, CHUNKS)
    down_chunks = load_columns(down_EDF + matrix, f, F, False, D, CHUNKS)
    # All three gradients are [D, F], so that the width D, which is the larger side, is dimension M of the products.
    dgate, dup = zeros_columns(BLOCK_F, CHUNKS), zeros_columns(BLOCK_F, CHUNKS)
    ddown = zeros_columns(BLOCK_F, CHUNKS)
    end = tl.load(offset_E1 + expert + 1)
    for start in range(tl.load(offset_E1 + expert), end, BLOCK_R):
        slot = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = slot < end
        route = tl.load(route_R + slot, mask=inside, other=0)
        row = (route // K).to(tl.int64)
        x = load_rows(x_ND, row, inside, D, CHUNKS)
        dy = load_rows(dy_ND, row, inside, D, CHUNKS)
        # Rows past the end of the expert get the scale 0, which removes them from all sums.
        scale = tl.load(scale_S + route, mask=inside, other=0.0).to(tl.float32)[:, None]
        h, da, du = _swiglu_gradients(
            matmul(x, gate_chunks, False), matmul(x, up_chunks, False), matmul(dy, down_chunks, False)
        )
        dgate = add_outer(dgate, x, da * scale)
        dup = add_outer(dup, x, du * scale)
        ddown = add_outer(ddown, dy, h * scale)
    store_columns(dgate_EFD + matrix, f, F, dgate, True, D, CHUNKS)
    store_columns(dup_EFD + matrix, f, F, dup, True, D, CHUNKS)
    store_columns(ddown_EDF + matrix, f, F, ddown, False, D, CHUNKS)
