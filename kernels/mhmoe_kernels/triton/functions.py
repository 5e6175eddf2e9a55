"""Device functions that several kernels call: matrix products, and GELU with its derivative."""

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers (Triton 3.9, `create_dot`), so `dot`
# widens them to float32 there. The result is that of a matrix unit, where products of bfloat16 are exact and sums are
# float32, too.
_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
_IEEE: tl.constexpr = tl.constexpr("ieee")  # Triton 3.6 takes no str as a default
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr = _IEEE):
    """Return sums + a @ b, added in float32. PRECISION is that of products of float32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    # By default Triton would multiply float32 as tf32, which drops 13 of the 23 bits of the fraction.
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def gelu(x):
    """Return GELU (the exact one, with erf) of float32 values."""
    return 0.5 * x * (1 + tl.erf(x * _SQRT_HALF))


@triton.jit
def gelu_slope(x):
    """Return the derivative of GELU at float32 values."""
    return 0.5 * (1 + tl.erf(x * _SQRT_HALF)) + x * _DENSITY_AT_0 * tl.exp(-0.5 * x * x)
