"""Experts for inference on CPUs, in which the result for a row does not depend on other rows, to the last bit.

`pack_layer` stores matrices once in the layout that oneDNN multiplies fastest. For CPUs on which oneDNN cannot do this,
`run_padded` rounds up the number of rows of each expert.

Padded experts. BLAS adds the terms of a product of few rows in another order than those of more rows, and gives each
thread a part of the rows. Few means fewer than four for OpenBLAS and for MKL on AMD's CPUs, and fewer than sixteen for
MKL on Intel's. The last bits of a row would depend on other rows, so two almost equal logits could change places.
Products of a multiple of sixteen rows do not have this problem, except in MKL with sums over a thousand or more values
and few outputs, which it splits among threads; but a torch with MKL also has oneDNN, so matrices are packed there.

Packed experts. oneDNN reads a matrix in the layout in which it is stored, so a float32 product of few rows takes a
third of the time, and a row's result is always the same (tests/kernels/test_packed.py). torch has these operators for
its compiler, which packs the weights of frozen models.

Packing works where oneDNN has blocked kernels: from AVX2 on in float32, from AVX512_BF16 on in bfloat16. At lower
levels oneDNN sums a single row in another order, as seen with SSE4.1 in float32 at widths from 384 to 1,024.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.cpu import CpuLevel, cpu_level, is_x86
from mhmoe_kernels.permutation import combine, plan_routes
from mhmoe_kernels.weights import ExpertWeights, Function, GeluSubln, Swiglu

# If the number of rows of a product is a multiple of this number, BLAS adds the terms of all rows in the same order
# (see the docstring of this module).
ROW_MULTIPLE = 16


def run_padded(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run `mhmoe_kernels.run_experts` with each expert's rows padded to a multiple of `ROW_MULTIPLE`.

    There is no backward, and the weights of experts without rows are not read.
    """
    assert not (torch.is_grad_enabled() and any(w.requires_grad for w in weights.stacked))
    plan = plan_routes(expert_NK, len(weights.stacked[0]))
    padded_count_E = (plan.count_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    # A route's slot is the position of its row in the order sorted by expert. It moves up by the padding of all experts
    # before the route's own expert.
    shift_E = (padded_count_E - plan.count_E).cumsum(0) - (padded_count_E - plan.count_E)
    plan = plan._replace(slot_NK=plan.slot_NK + shift_E[expert_NK])
    padded_counts = padded_count_E.tolist()
    # Row 0 fills the padding. Any row would do, because the outputs of the padding are not read.
    row_P = torch.zeros(sum(padded_counts), dtype=torch.long, device=x_ND.device)
    row_P[plan.slot_NK] = torch.arange(len(x_ND), device=x_ND.device)[:, None]
    experts = zip(*(w.unbind(0) for w in weights.stacked), strict=True)
    parts = zip(torch.split(x_ND.index_select(0, row_P), padded_counts), experts, padded_counts, strict=True)
    outputs = [weights.function(x, *expert) for x, expert, count in parts if count]
    return combine(torch.cat(outputs) if outputs else x_ND.new_empty(0, x_ND.shape[1]), gate_NK, plan)


LAYOUT_ROWS = 16
"""Rows for which oneDNN chooses the packed layout, which works for any number."""


def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Return in one line why this machine cannot pack matrices of a dtype; None if it can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN cannot pack {dtype}"
    if not torch._C._has_mkldnn:
        return "this build of torch has no oneDNN"
    if is_x86():
        if cpu_level() < CpuLevel.AVX2:
            return "without AVX2 oneDNN's result for a row depends on the other rows"
        has_bfloat16 = cpu_level() >= CpuLevel.AVX512_BF16
    else:
        has_bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return "oneDNN has no bfloat16 on this CPU" if dtype == torch.bfloat16 and not has_bfloat16 else None


class PackedMatrix:
    """Matrix for F.linear in oneDNN's packed layout, with an optional bias and no backward."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.dtype = weight_OI.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), LAYOUT_ROWS)
        self._bias_O = None if bias_O is None else bias_O.to(self.dtype)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """Cast rows to the matrix's dtype and multiply them."""
        x_NI = x_NI.to(self.dtype)
        y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self._packed, self._bias_O, "none", [], "")
        return y_NO


RowFunction = Callable[[Tensor], Tensor]
"""Function x_ND -> y_ND of one feed-forward layer or expert."""


def pack_layer(function: Function, weights: Sequence[Tensor]) -> RowFunction:
    """Pack the matrices of a layer or an expert into a function of rows without backward."""
    if isinstance(function, Swiglu):
        gate_FD, up_FD, down_DF = weights
        return partial(_swiglu, PackedMatrix(torch.cat([gate_FD, up_FD])), PackedMatrix(down_DF))
    fc1_FD, fc1_bias_F, norm_weight_F, norm_bias_F, fc2_DF, fc2_bias_D = weights
    assert isinstance(function, GeluSubln)
    shape, eps = norm_weight_F.shape, function.eps
    norm = partial(F.layer_norm, normalized_shape=shape, weight=norm_weight_F, bias=norm_bias_F, eps=eps)
    return partial(_gelu_subln, PackedMatrix(fc1_FD, fc1_bias_F), norm, PackedMatrix(fc2_DF, fc2_bias_D))


def _swiglu(gate_up_matrix: PackedMatrix, down_matrix: PackedMatrix, x_ND: Tensor) -> Tensor:
    gate_NF, up_NF = gate_up_matrix(x_ND).chunk(2, dim=-1)
    return down_matrix(F.silu(gate_NF).mul_(up_NF))


def _gelu_subln(fc1_matrix: PackedMatrix, norm: RowFunction, fc2_matrix: PackedMatrix, x_ND: Tensor) -> Tensor:
    # GELU and the norm are computed in float32; the matrix of fc2 rounds their result to its dtype.
    return fc2_matrix(norm(F.gelu(fc1_matrix(x_ND).float())))


def run_packed(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Sequence[RowFunction]) -> Tensor:
    """Run `mhmoe_kernels.run_experts` with experts from `pack_layer`, like `run_padded`."""
    plan = plan_routes(expert_NK, len(experts))
    parts = torch.split(x_ND.index_select(0, plan.row_R), plan.count_E.tolist())
    outputs = [expert(x) for expert, x in zip(experts, parts, strict=True) if len(x)]
    return combine(torch.cat(outputs) if outputs else x_ND.new_empty(0, x_ND.shape[1]), gate_NK, plan)
