"""Kernels of GELU and SubLN's norm between the two matrix products of an expert, and sums over an expert's rows.

The result of the first product is `inner`. With g = gelu(inner), its mean and deviation over F, and z = (g - mean) /
deviation, an expert computes

    normed = w z + b

with the norm's weight w and bias b. Mean and deviation are kept for the backward, two numbers per route.
"""

import triton
import triton.language as tl

from mhmoe_kernels.triton.functions import gelu, gelu_slope


@triton.jit
def _load_vector(v_EF, expert, column, F: tl.constexpr):
    return tl.load(v_EF + expert * F + column, mask=column < F, other=0.0).to(tl.float32)[None, :]


@triton.jit
def gelu_norm_forward(
    inner_RF, norm_weight_EF, norm_bias_EF, offset_E1, expert_T, start_T, normed_RF, mean_R, rstd_R, eps,
    F: tl.constexpr, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Compute normed = norm(gelu(inner)) for BLOCK_R rows of a tile, and store mean and 1/deviation of each row."""
    expert = tl.load(expert_T + tl.program_id(0))
    if expert >= E:
        return
    expert = expert.to(tl.int64)
    slot = (tl.load(start_T + tl.program_id(0)) + tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    inside = slot < tl.load(offset_E1 + expert + 1)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, F, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        mask = inside[:, None] & (column < F)[None, :]
        # gelu(0) is 0, so masked values do not count.
        inner = tl.load(inner_RF + slot[:, None] * F + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(gelu(inner), 1)
    mean = total / F
    squares = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, F, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        mask = inside[:, None] & (column < F)[None, :]
        inner = tl.load(inner_RF + slot[:, None] * F + column[None, :], mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, gelu(inner) - mean[:, None], 0.0)
        squares += tl.sum(deviation * deviation, 1)
    rstd = tl.rsqrt(squares / F + eps)
    for start in range(0, F, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        mask = inside[:, None] & (column < F)[None, :]
        inner = tl.load(inner_RF + slot[:, None] * F + column[None, :], mask=mask, other=0.0).to(tl.float32)
        normed = (gelu(inner) - mean[:, None]) * rstd[:, None] * _load_vector(norm_weight_EF, expert, column, F)
        normed += _load_vector(norm_bias_EF, expert, column, F)
        tl.store(normed_RF + slot[:, None] * F + column[None, :], normed.to(normed_RF.dtype.element_ty), mask=mask)
    tl.store(mean_R + slot, mean, mask=inside)
    tl.store(rstd_R + slot, rstd, mask=inside)


@triton.jit
def gelu_norm_backward(
    inner_RF, dnormed_RF, mean_R, rstd_R, norm_weight_EF, norm_bias_EF, dout_RD, out_bias_ED, scale_S, route_R,
    offset_E1, expert_T, start_T, dinner_RF, normed_RF, dscale_S,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of `inner`, and the normed values again, both times the route's scale (gate).

    dnormed and dout do not contain the scale. Its gradient is <dy, fc2(normed)> = <dnormed, normed> + <dout, bias of
    fc2>.
    """
    expert = tl.load(expert_T + tl.program_id(0))
    if expert >= E:
        return
    expert = expert.to(tl.int64)
    slot = (tl.load(start_T + tl.program_id(0)) + tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    inside = slot < tl.load(offset_E1 + expert + 1)
    mean = tl.load(mean_R + slot, mask=inside, other=0.0)[:, None]
    rstd = tl.load(rstd_R + slot, mask=inside, other=0.0)[:, None]
    total, product = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    dscale = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, F, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        mask = inside[:, None] & (column < F)[None, :]
        value = slot[:, None] * F + column[None, :]
        z = (gelu(tl.load(inner_RF + value, mask=mask, other=0.0).to(tl.float32)) - mean) * rstd
        dnormed = tl.load(dnormed_RF + value, mask=mask, other=0.0).to(tl.float32)
        weight = _load_vector(norm_weight_EF, expert, column, F)
        total += tl.sum(dnormed * weight, 1)
        product += tl.sum(dnormed * weight * z, 1)
        dscale += tl.sum(dnormed * (weight * z + _load_vector(norm_bias_EF, expert, column, F)), 1)
    for start in range(0, D, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        mask = inside[:, None] & (column < D)[None, :]
        dout = tl.load(dout_RD + slot[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dscale += tl.sum(dout * _load_vector(out_bias_ED, expert, column, D), 1)
    route = tl.load(route_R + slot, mask=inside, other=0)
    scale = tl.load(scale_S + route, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(dscale_S + route, dscale, mask=inside)
    mean_total, mean_product = (total / F)[:, None], (product / F)[:, None]
    for start in range(0, F, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        mask = inside[:, None] & (column < F)[None, :]
        value = slot[:, None] * F + column[None, :]
        inner = tl.load(inner_RF + value, mask=mask, other=0.0).to(tl.float32)
        z = (gelu(inner) - mean) * rstd
        dnormed = tl.load(dnormed_RF + value, mask=mask, other=0.0).to(tl.float32)
        weight = _load_vector(norm_weight_EF, expert, column, F)
        dgelu = rstd * (dnormed * weight - mean_total - z * mean_product)
        dinner = dgelu * gelu_slope(inner) * scale
        tl.store(dinner_RF + value, dinner.to(dinner_RF.dtype.element_ty), mask=mask)
        normed = (weight * z + _load_vector(norm_bias_EF, expert, column, F)) * scale
        tl.store(normed_RF + value, normed.to(normed_RF.dtype.element_ty), mask=mask)


@triton.jit
def norm_sums(
    inner_RF, dnormed_RF, mean_R, rstd_R, scale_S, route_R, offset_E1, dweight_EF, dbias_EF, F: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the norm's weight and bias; a program adds BLOCK_F columns of an expert in float32."""
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    dweight, dbias = tl.zeros([BLOCK_F], tl.float32), tl.zeros([BLOCK_F], tl.float32)
    end = tl.load(offset_E1 + expert + 1)
    for start in range(tl.load(offset_E1 + expert), end, BLOCK_R):
        slot = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = slot < end
        mask = inside[:, None] & (column < F)[None, :]
        value = slot[:, None] * F + column[None, :]
        mean = tl.load(mean_R + slot, mask=inside, other=0.0)[:, None]
        rstd = tl.load(rstd_R + slot, mask=inside, other=0.0)[:, None]
        z = (gelu(tl.load(inner_RF + value, mask=mask, other=0.0).to(tl.float32)) - mean) * rstd
        dnormed = tl.load(dnormed_RF + value, mask=mask, other=0.0).to(tl.float32)
        route = tl.load(route_R + slot, mask=inside, other=0)
        dnormed *= tl.load(scale_S + route, mask=inside, other=0.0).to(tl.float32)[:, None]
        dweight += tl.sum(dnormed * z, 0)
        dbias += tl.sum(dnormed, 0)
    tl.store(dweight_EF + expert * F + column, dweight.to(dweight_EF.dtype.element_ty), mask=column < F)
    tl.store(dbias_EF + expert * F + column, dbias.to(dbias_EF.dtype.element_ty), mask=column < F)


@triton.jit
def row_sums(
    x_RF, scale_S, route_R, offset_E1, sum_EF, F: tl.constexpr,
    HAS_SCALES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Add the rows of each expert, times their scales; a program adds BLOCK_F columns of an expert in float32."""
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros([BLOCK_F], tl.float32)
    end = tl.load(offset_E1 + expert + 1)
    for start in range(tl.load(offset_E1 + expert), end, BLOCK_R):
        slot = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (slot < end)[:, None] & (column < F)[None, :]
        x = tl.load(x_RF + slot[:, None] * F + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALES:
            route = tl.load(route_R + slot, mask=slot < end, other=0)
            x *= tl.load(scale_S + route, mask=slot < end, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(x, 0)
    tl.store(sum_EF + expert * F + column, total.to(sum_EF.dtype.element_ty), mask=column < F)
