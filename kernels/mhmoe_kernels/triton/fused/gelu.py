"""GELU experts with biases and SubLN's inner LayerNorm over f, fc2(norm(gelu(fc1(x)))), on sorted rows.

fc2 follows a norm over all hidden units f of an expert. Nevertheless, one loop over f is enough, because everything
after the norm is linear. With g = gelu(fc1(x)), its mean and deviation over f, and z = (g - mean) / deviation,

    y = W2 (w z + b) + b2 = (W2 (w g) - mean * (W2 w)) / deviation + (W2 b + b2)

so the loop sums W2 (w g) and the statistics; s = W2 w and c = W2 b + b2 are computed once for each expert. Mean and
squared deviations are merged tile by tile (Chan et al. 1983), because E[g^2] - E[g]^2 would cancel.

In the backward, with t = W2^T dy, A = <w, t> / F = <s, dy> / F and C = <w z, t> / F for each row,

    dx = W1^T (gelu' dg),    dg = (w t - A - z C) / deviation

A needs no loop over f. C needs a first loop, which also gives the gradient of the gate: <y, dy> = F C + <c, dy>.
"""

import triton
import triton.language as tl

from mhmoe_kernels.triton.functions import gelu, gelu_slope
from mhmoe_kernels.triton.fused.chunks import (
    add_matmul,
    add_outer,
    chunk_columns,
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
def _load_vector(v_F, f, F):
    return tl.load(v_F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _dot_rows(rows, v_D, D: tl.constexpr, CHUNKS: tl.constexpr):
    total = tl.sum(rows[0].to(tl.float32) * _load_vector(v_D, chunk_columns(CHUNKS, 0), D), 1)
    for c in tl.static_range(1, len(CHUNKS)):
        total += tl.sum(rows[c].to(tl.float32) * _load_vector(v_D, chunk_columns(CHUNKS, c), D), 1)
    return total


@triton.jit
def gelu_forward(
    x_ND, fc1_EFD, fc1_bias_EF, norm_weight_EF, fc2_EDF, s_ED, c_ED, route_R, offset_E1, expert_T, start_T,
    out_RD, mean_R, rstd_R, eps,
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
    mean, squared_deviations = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        u = matmul(x, load_rows(fc1_EFD + matrix, f, f < F, D, CHUNKS), True)
        g = gelu(u + _load_vector(fc1_bias_EF + expert * F, f, F))
        weighted = g * _load_vector(norm_weight_EF + expert * F, f, F)
        out = add_matmul(out, weighted, load_columns(fc2_EDF + matrix, f, F, False, D, CHUNKS), True)
        # g is 0 in columns past the hidden width F, so its sum needs no mask. Its deviations from the mean are not 0
        # there, so they need one.
        merged_count, tile_count = f0 * 1.0, tl.minimum(F - f0, BLOCK_F) * 1.0
        tile_mean = tl.sum(g, 1) / tile_count
        deviation = tl.where((f < F)[None, :], g - tile_mean[:, None], 0.0)
        shift = tile_mean - mean
        squared_deviations += tl.sum(deviation * deviation, 1) + shift * shift * (
            merged_count * tile_count / (merged_count + tile_count)
        )
        mean += shift * (tile_count / (merged_count + tile_count))
    rstd = tl.rsqrt(squared_deviations / F + eps)
    for c in tl.static_range(len(CHUNKS)):
        col = chunk_columns(CHUNKS, c)
        s, bias = _load_vector(s_ED + expert * D, col, D), _load_vector(c_ED + expert * D, col, D)
        y = (out[c] - mean[:, None] * s) * rstd[:, None] + bias
        mask = inside[:, None] & (col < D)[None, :]
        tl.store(out_RD + slot[:, None] * D + col[None, :], y.to(out_RD.dtype.element_ty), mask=mask)
    tl.store(mean_R + slot, mean, mask=inside)
    tl.store(rstd_R + slot, rstd, mask=inside)


@triton.jit
def gelu_backward_rows(
    x_ND, dy_ND, fc1_EFD, fc1_bias_EF, norm_weight_EF, fc2_EDF, s_ED, c_ED, mean_R, rstd_R, route_R, scale_S,
    offset_E1, expert_T, start_T, dx_RD, dscale_S, a_R, c_R,
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
    mean = tl.load(mean_R + slot, mask=inside, other=0.0)[:, None]
    rstd = tl.load(rstd_R + slot, mask=inside, other=0.0)[:, None]
    a = _dot_rows(dy, s_ED + expert * D, D, CHUNKS) / F
    c = tl.zeros([BLOCK_R], tl.float32)
    vector, matrix = expert * F, expert * F * D
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        fc1 = load_rows(fc1_EFD + matrix, f, f < F, D, CHUNKS)
        z = (gelu(matmul(x, fc1, True) + _load_vector(fc1_bias_EF + vector, f, F)) - mean) * rstd
        t = matmul(dy, load_columns(fc2_EDF + matrix, f, F, False, D, CHUNKS), False)
        c += tl.sum(t * _load_vector(norm_weight_EF + vector, f, F) * z, 1)
    tl.store(dscale_S + route, c + _dot_rows(dy, c_ED + expert * D, D, CHUNKS), mask=inside)
    # a and c are sums over all hidden columns f. They are stored for the kernel for gradients of weights, whose
    # programs each see only a part of these columns.
    c /= F
    tl.store(a_R + slot, a, mask=inside)
    tl.store(c_R + slot, c, mask=inside)
    dx = zeros_rows(BLOCK_R, CHUNKS)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        fc1 = load_rows(fc1_EFD + matrix, f, f < F, D, CHUNKS)
        u = matmul(x, fc1, True) + _load_vector(fc1_bias_EF + vector, f, F)
        t = matmul(dy, load_columns(fc2_EDF + matrix, f, F, False, D, CHUNKS), False)
        dg = t * _load_vector(norm_weight_EF + vector, f, F) - a[:, None] - (gelu(u) - mean) * rstd * c[:, None]
        dx = add_matmul(dx, gelu_slope(u) * dg, fc1, False)
    scale = tl.load(scale_S + route, mask=inside, other=0.0).to(tl.float32)[:, None] * rstd
    store_rows(dx_RD, slot, inside, scale_rows(dx, scale), D, CHUNKS)


@triton.jit
def gelu_backward_weights(
    x_ND, dy_ND, fc1_EFD, fc1_bias_EF, norm_weight_EF, norm_bias_EF, fc2_EDF, mean_R, rstd_R, a_R, c_R,
    route_R, scale_S, offset_E1, dfc1_EFD, dfc1_bias_EF, dnorm_weight_EF, dnorm_bias_EF, dfc2_EDF,
    F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    # The index is 64 bits wide, because the offset of an expert's matrix may exceed 32 bits.
    expert = tl.program_id(1).to(tl.int64)
    vector, matrix = expert * F, expert * F * D
    # The weights are loaded as [D, F]. If they were transposed inside the loop instead, they would stay in registers
    # and pass through shared memory in every iteration.
    fc1 = load_columns(fc1_EFD + matrix, f, F, True, D, CHUNKS)
    fc2 = load_columns(fc2_EDF + matrix, f, F, False, D, CHUNKS)
    fc1_bias = _load_vector(fc1_bias_EF + vector, f, F)
    norm_weight, norm_bias = _load_vector(norm_weight_EF + vector, f, F), _load_vector(norm_bias_EF + vector, f, F)
    dfc1, dfc2 = zeros_columns(BLOCK_F, CHUNKS), zeros_columns(BLOCK_F, CHUNKS)
    dfc1_bias, dnorm_weight = tl.zeros([BLOCK_F], tl.float32), tl.zeros([BLOCK_F], tl.float32)
    dnorm_bias = tl.zeros([BLOCK_F], tl.float32)
    end = tl.load(offset_E1 + expert + 1)
    for start in range(tl.load(offset_E1 + expert), end, BLOCK_R):
        slot = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = slot < end
        route = tl.load(route_R + slot, mask=inside, other=0)
        row = (route // K).to(tl.int64)
        x = load_rows(x_ND, row, inside, D, CHUNKS)
        dy = load_rows(dy_ND, row, inside, D, CHUNKS)
        mean = tl.load(mean_R + slot, mask=inside, other=0.0)[:, None]
        rstd = tl.load(rstd_R + slot, mask=inside, other=0.0)[:, None]
        a = tl.load(a_R + slot, mask=inside, other=0.0)[:, None]
        c = tl.load(c_R + slot, mask=inside, other=0.0)[:, None]
        # Rows past the end of the expert get the scale 0, which removes them from all sums.
        scale = tl.load(scale_S + route, mask=inside, other=0.0).to(tl.float32)[:, None]
        u = matmul(x, fc1, False) + fc1_bias
        z = (gelu(u) - mean) * rstd
        t = matmul(dy, fc2, False)
        du = gelu_slope(u) * (t * norm_weight - a - z * c) * (rstd * scale)
        t *= scale
        dfc1_bias += tl.sum(du, 0)
        dnorm_weight += tl.sum(t * z, 0)
        dnorm_bias += tl.sum(t, 0)
        dfc1 = add_outer(dfc1, x, du)
        dfc2 = add_outer(dfc2, dy, (z * norm_weight + norm_bias) * scale)
    store_columns(dfc1_EFD + matrix, f, F, dfc1, True, D, CHUNKS)
    store_columns(dfc2_EDF + matrix, f, F, dfc2, False, D, CHUNKS)
    tl.store(dfc1_bias_EF + vector + f, dfc1_bias.to(dfc1_bias_EF.dtype.element_ty), mask=f < F)
    tl.store(dnorm_weight_EF + vector + f, dnorm_weight.to(dnorm_weight_EF.dtype.element_ty), mask=f < F)
    tl.store(dnorm_bias_EF + vector + f, dnorm_bias.to(dnorm_bias_EF.dtype.element_ty), mask=f < F)


@triton.jit
def weighted_row_sums(
    dy_ND, route_R, scale_S, offset_E1, sum_ED,
    K: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Store the gradient of fc2's bias: the sum of scale * dy over the routes of each expert."""
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    expert = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    end = tl.load(offset_E1 + expert + 1)
    for start in range(tl.load(offset_E1 + expert), end, BLOCK_R):
        slot = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        route = tl.load(route_R + slot, mask=slot < end, other=0)
        row = (route // K).to(tl.int64)
        scale = tl.load(scale_S + route, mask=slot < end, other=0.0).to(tl.float32)
        mask = (slot < end)[:, None] & (col < D)[None, :]
        total += scale[:, None] * tl.load(dy_ND + row[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sum_ED + expert * D + col, tl.sum(total, 0).to(sum_ED.dtype.element_ty), mask=col < D)
