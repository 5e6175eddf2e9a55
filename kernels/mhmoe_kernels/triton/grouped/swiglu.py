"""Kernels of SwiGLU between the matrix products of an expert: hidden = silu(gate) * up, and its gradients."""

import triton
import triton.language as tl


@triton.jit
def swiglu_forward(gate_RF, up_RF, hidden_RF, VALUES, BLOCK: tl.constexpr):
    """Compute silu(gate) * up in float32, and store it in the dtype of `hidden_RF`."""
    value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = value < VALUES
    gate = tl.load(gate_RF + value, mask=mask, other=0.0).to(tl.float32)
    up_value = tl.load(up_RF + value, mask=mask, other=0.0).to(tl.float32)
    tl.store(hidden_RF + value, (gate * tl.sigmoid(gate) * up_value).to(hidden_RF.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def swiglu_backward(
    gate_RF, up_RF, dhidden_RF, scale_S, route_R, dgate_RF, dup_RF, hidden_RF, dscale_S, R, F: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of gate and up, and the hidden values again, all times the route's scale (gate).

    dhidden does not contain the scale, so its product with the hidden values is the gradient of the scale, without the
    expert's output: <dy, down(h)> = <down^T(dy), h>. Scales are in the order of routes, not of slots.
    """
    slot = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = slot < R
    route = tl.load(route_R + slot, mask=inside, other=0)
    scale = tl.load(scale_S + route, mask=inside, other=0.0).to(tl.float32)[:, None]
    dscale = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, F, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        mask = inside[:, None] & (column < F)[None, :]
        value = slot[:, None] * F + column[None, :]
        gate = tl.load(gate_RF + value, mask=mask, other=0.0).to(tl.float32)
        up_value = tl.load(up_RF + value, mask=mask, other=0.0).to(tl.float32)
        dhidden = tl.load(dhidden_RF + value, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up_value
        dscale += tl.sum(hidden * dhidden, 1)
        hidden *= scale
        dhidden *= scale
        tl.store(hidden_RF + value, hidden.to(hidden_RF.dtype.element_ty), mask=mask)
        dgate = dhidden * up_value * (sigmoid + silu * (1 - sigmoid))
        tl.store(dgate_RF + value, dgate.to(dgate_RF.dtype.element_ty), mask=mask)
        tl.store(dup_RF + value, (dhidden * silu).to(dup_RF.dtype.element_ty), mask=mask)
    tl.store(dscale_S + route, dscale, mask=inside)
