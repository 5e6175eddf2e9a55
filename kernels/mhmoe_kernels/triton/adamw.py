"""AdamW with moments in bfloat16, rounded stochastically, as one kernel.

The kernel computes what torch's fused AdamW computes in float32 on a CPU with AVX2 or AVX-512, in the same order and
with the same roundings, so that devices agree to the bit. It fuses a product with a sum only where torch does.
"""

import triton
import triton.language as tl

# 2^64 / golden ratio, rounded down to an odd number, signed. It spreads positions over 64 bits by multiplication.
_GOLDEN_RATIO: tl.constexpr = tl.constexpr(-0x61C8864680B583EB)


@triton.jit
def _random_bits(key, position):
    """Return 32 random bits for each 64-bit position, as `random_bits` of mhmoe_ray does."""
    bits = (((position * _GOLDEN_RATIO) >> 32).to(tl.int32) ^ key).to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _round(value, bits):
    """Return float32 as bfloat16, away from zero if the sum of its low 16 bits and `bits` has more than 16 bits."""
    pattern = value.to(tl.int32, bitcast=True) + bits.to(tl.int32, bitcast=True)
    return (pattern >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["offset", "key"])
def update(
    weight_V, gradient_V, mean_V, square_V, V, offset, key, decay, step_size, mean_share, square_factor, square_share,
    correction, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update V weights and their moments; `offset` is the position of the first one in the full tensor."""
    value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = value < V
    gradient = tl.load(gradient_V + value, mask=mask, other=0.0)
    mean = tl.load(mean_V + value, mask=mask, other=0.0).to(tl.float32)
    square = tl.load(square_V + value, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_V + value, mask=mask, other=0.0) * decay
    # This is torch's lerp, which starts at the nearer end.
    share = tl.full([BLOCK], mean_share, tl.float32)
    is_near = share < 0.5
    base = tl.where(is_near, mean, gradient)
    mean = tl.fma(tl.where(is_near, share, share - 1), gradient - mean, base)
    square = tl.fma(square_share * gradient, gradient, square * square_factor)
    denominator = tl.div_rn(tl.sqrt_rn(square), correction) + eps
    tl.store(weight_V + value, weight - tl.div_rn(step_size * mean, denominator), mask=mask)
    bits = _random_bits(key, value + offset)
    tl.store(mean_V + value, _round(mean, bits & 0xFFFF), mask=mask)
    tl.store(square_V + value, _round(square, bits >> 16), mask=mask)
