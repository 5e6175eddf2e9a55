"""Experts for inference on CPUs, in which the result for a row does not depend on other rows, to the last bit.

`packed` lays matrices out once in the way that oneDNN multiplies fastest; `padded` rounds the number of rows of each
expert up where oneDNN cannot pack.

Padded experts. BLAS adds up a product of few rows in another order than one of more rows (OpenBLAS and MKL on AMD's
CPUs: fewer than four, MKL on Intel's: fewer than sixteen), and gives each thread a part of the rows. A row alone would
therefore get other last bits than the same row among others, and a near-tie another token. This does not happen in
products of a multiple of sixteen rows, except for MKL's with sums over a thousand or more values and few outputs, which
it splits among threads; a torch with MKL has oneDNN too, and packs its matrices instead.

Packed experts. A matrix is read in the layout in which it is stored, so that in float32 a product of few rows takes a
third of the time of a plain one. The result for a row does not depend on other rows, to the last bit, however many
there are (tests/kernels/test_packed.py). torch has these operators for its compiler, which packs the weights of frozen
models in the same way.

This holds where oneDNN has blocked kernels for the CPU: from AVX2 on in float32, from AVX512_BF16 on in bfloat16. With
less, its products are those of a BLAS, which adds up a row alone in another order (restricted to SSE4.1 it does so in
float32, width 384 to 1,024); there, matrices are not packed, and `padded` runs the rows.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.cpu import CpuLevel, cpu_level, is_x86
from mhmoe_kernels.permutation import combine, plan_routes
from mhmoe_kernels.weights import ExpertWeights, Function, Swiglu

MULTIPLE = 16


def padded(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through padded experts: see `mhmoe_kernels.run_experts`. There is no backward, and experts
    without rows are not touched."""
    assert not (torch.is_grad_enabled() and any(w.requires_grad for w in weights.stacked))
    plan = plan_routes(expert_NK, len(weights.stacked[0]))
    room_E = (plan.count_E + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    # How much farther a route lies than without the room before it.
    ahead_E = (room_E - plan.count_E).cumsum(0) - (room_E - plan.count_E)
    plan = plan._replace(slot_NK=plan.slot_NK + ahead_E[expert_NK])
    rooms = room_E.tolist()
    row_P = torch.zeros(sum(rooms), dtype=torch.long, device=x_ND.device)  # any row fills the rest
    row_P[plan.slot_NK] = torch.arange(len(x_ND), device=x_ND.device)[:, None]
    experts = zip(*(w.unbind(0) for w in weights.stacked), strict=True)
    parts = zip(torch.split(x_ND.index_select(0, row_P), rooms), experts, rooms, strict=True)
    out = [weights.function(x, *expert) for x, expert, room in parts if room]
    return combine(torch.cat(out) if out else x_ND.new_empty(0, x_ND.shape[1]), gate_NK, plan)


LIKELY_ROWS = 16
"""Number of rows that the packed layout is chosen for; any other number works too."""


def why_not(dtype: torch.dtype) -> str | None:
    """Return in one line why matrices of this dtype cannot be packed here; None if they can.

    Raises:
        ValueError: MHMOE_CPU_LEVEL names no level.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN packs no {dtype}"
    if not torch._C._has_mkldnn:
        return "this torch is built without oneDNN"
    if is_x86():
        if cpu_level() < CpuLevel.AVX2:
            return "without AVX2 oneDNN gives a row other bits among others"
        has_bfloat16 = cpu_level() >= CpuLevel.AVX512_BF16
    else:
        has_bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return "oneDNN has no bfloat16 on this CPU" if dtype == torch.bfloat16 and not has_bfloat16 else None


class PackedMatrix:
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        """Pack a matrix.

        Args:
            weight_OI: matrix as F.linear takes it; no reference to it is kept.
            bias_O: bias of its outputs.
        """
        self.dtype = weight_OI.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), LIKELY_ROWS)
        self._bias_O = None if bias_O is None else bias_O.to(self.dtype)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """Multiply rows, cast to the matrix's dtype, by the matrix; the result has that dtype. There is no backward."""
        x_NI = x_NI.to(self.dtype)
        y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self._packed, self._bias_O, "none", [], "")
        return y_NO


Rows = Callable[[Tensor], Tensor]
"""Function x_ND -> y_ND."""


def packed(function: Function, weights: Sequence[Tensor]) -> Rows:
    """Return a feed-forward layer, or one expert, with packed matrices.

    Args:
        function: the function that the weights belong to.
        weights: its weights, in the order of its arguments.
    """
    if isinstance(function, Swiglu):
        gate_FD, up_FD, down_DF = weights
        return partial(_swiglu, PackedMatrix(torch.cat([gate_FD, up_FD])), PackedMatrix(down_DF))
    fc1_FD, fc1_bias_F, norm_weight_F, norm_bias_F, fc2_DF, fc2_bias_D = weights
    shape, eps = norm_weight_F.shape, function.eps
    norm = partial(F.layer_norm, normalized_shape=shape, weight=norm_weight_F, bias=norm_bias_F, eps=eps)
    return partial(_gelu_subln, PackedMatrix(fc1_FD, fc1_bias_F), norm, PackedMatrix(fc2_DF, fc2_bias_D))


def _swiglu(gate_up: PackedMatrix, down: PackedMatrix, x_ND: Tensor) -> Tensor:
    gate_NF, up_NF = gate_up(x_ND).chunk(2, dim=-1)
    return down(F.silu(gate_NF).mul_(up_NF))


def _gelu_subln(fc1: PackedMatrix, norm: Rows, fc2: PackedMatrix, x_ND: Tensor) -> Tensor:
    return fc2(norm(F.gelu(fc1(x_ND).float())))


def run_packed(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Sequence[Rows]) -> Tensor:
    """Run routed rows through packed experts: see `mhmoe_kernels.run_experts`. There is no backward, and experts
    without rows are not touched."""
    plan = plan_routes(expert_NK, len(experts))
    parts = torch.split(x_ND.index_select(0, plan.row_R), plan.count_E.tolist())
    out = [expert(x) for expert, x in zip(experts, parts, strict=True) if len(x)]
    return combine(torch.cat(out) if out else x_ND.new_empty(0, x_ND.shape[1]), gate_NK, plan)
