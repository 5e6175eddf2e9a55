"""Matrices and experts for inference on CPUs, in which the result for a row depends on no other row, to the last bit.

`PackedMatrix` stores a matrix once in the layout that oneDNN multiplies fastest. For CPUs on which oneDNN cannot do
this, `PaddedMatrix` rounds up the number of rows.

Padded rows. BLAS adds the terms of a product of few rows in another order than those of more rows, and gives each
thread a part of the rows. Few means fewer than four for OpenBLAS and for MKL on AMD's CPUs, and fewer than sixteen for
MKL on Intel's. The last bits of a row would depend on other rows, so two almost equal logits could change places.
Products of a multiple of sixteen rows do not have this problem, except in MKL with sums over a thousand or more values
and few outputs, which it splits among threads; but a torch with MKL also has oneDNN, so matrices are packed there.

Packed matrices. oneDNN reads a matrix in the layout in which it is stored, so a float32 product of few rows takes a
third of the time, and a row's result is always the same (tests/kernels/test_packed.py). torch has these operators for
its compiler, which packs the weights of frozen models.

Packing works where oneDNN has blocked kernels: from AVX2 on in float32, from AVX512_BF16 on in bfloat16. At lower
levels oneDNN sums a single row in another order, as seen with SSE4.1 in float32 at widths from 384 to 1,024.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.cpu import CpuLevel, cpu_level, is_x86
from mhmoe_kernels.permutation import combine, plan_routes
from mhmoe_kernels.weights import Function, GeluSubln, Swiglu

# If the number of rows of a product is a multiple of this number, BLAS adds the terms of all rows in the same order
# (see the docstring of this module).
ROW_MULTIPLE = 16


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


class PaddedMatrix:
    """Matrix for F.linear on any device, with an optional bias; rows are padded to a multiple of `ROW_MULTIPLE`."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.dtype = weight_OI.dtype
        self._weight_OI, self._bias_O = weight_OI, None if bias_O is None else bias_O.to(self.dtype)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """Cast rows to the matrix's dtype and multiply them."""
        x_PI = F.pad(x_NI.to(self.dtype), (0, 0, 0, -len(x_NI) % ROW_MULTIPLE))
        return F.linear(x_PI, self._weight_OI, self._bias_O)[: len(x_NI)]


RowFunction = Callable[..., Tensor]
"""Function x_ND -> y_ND of one matrix, feed-forward layer or expert. It may also take the `RowGroups` of its rows."""
RowGroups = Sequence[tuple[Any, int]]
"""Consecutive rows that share something, such as an adapter: for each group, what its rows share, and their number."""
MakeMatrix = Callable[[tuple[int, ...], Tensor, Tensor | None], RowFunction]
"""Function (positions, matrix, bias) that packs the matrices at these positions among a layer's weights as one."""


@dataclass(frozen=True)
class RowLayer:
    """Feed-forward layer or expert with two matrices and an activation between them."""

    first_matrix: RowFunction
    activation: RowFunction
    second_matrix: RowFunction

    def __call__(self, x_ND: Tensor, *groups: RowGroups) -> Tensor:
        return self.second_matrix(self.activation(self.first_matrix(x_ND, *groups)), *groups)


def pack_layer(
    function: Function,
    weights: Sequence[Tensor],
    make_matrix: MakeMatrix = lambda positions, weight_OI, bias_O: PackedMatrix(weight_OI, bias_O),
) -> RowLayer:
    """Turn a layer or an expert into a function of rows without backward."""
    if isinstance(function, Swiglu):
        gate_FD, up_FD, down_DF = weights
        return RowLayer(
            make_matrix((0, 1), torch.cat([gate_FD, up_FD]), None), _swiglu, make_matrix((2,), down_DF, None)
        )
    fc1_FD, fc1_bias_F, norm_weight_F, norm_bias_F, fc2_DF, fc2_bias_D = weights
    assert isinstance(function, GeluSubln)
    activation = partial(_gelu_norm, norm_weight_F, norm_bias_F, function.eps)
    return RowLayer(make_matrix((0,), fc1_FD, fc1_bias_F), activation, make_matrix((4,), fc2_DF, fc2_bias_D))


def _swiglu(gate_up_NF: Tensor) -> Tensor:
    gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
    return F.silu(gate_NF).mul_(up_NF)


def _gelu_norm(weight_F: Tensor, bias_F: Tensor, eps: float, x_NF: Tensor) -> Tensor:
    # GELU and the norm are computed in float32; the next matrix rounds their result to its dtype.
    return F.layer_norm(F.gelu(x_NF.float()), weight_F.shape, weight_F, bias_F, eps)


def run_packed(
    x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Sequence[RowFunction], groups: RowGroups = ()
) -> Tensor:
    """Run `mhmoe_kernels.run_experts` with experts from `pack_layer`; each gets the groups of its rows, if any."""
    # The routes of an expert are sorted by group, so that an expert reads its matrices once for all groups.
    count = max(1, len(groups))
    if groups:
        lengths = torch.tensor([length for _, length in groups], device=x_ND.device)
        expert_NK = expert_NK * count + torch.arange(count, device=x_ND.device).repeat_interleave(lengths)[:, None]
    plan = plan_routes(expert_NK, len(experts) * count)
    counts = plan.count_E.view(-1, count).tolist()
    parts = torch.split(x_ND.index_select(0, plan.row_R), [sum(lengths) for lengths in counts])
    outputs = [
        expert(x, [(shared, length) for (shared, _), length in zip(groups, lengths, strict=True)])
        if groups
        else expert(x)
        for expert, x, lengths in zip(experts, parts, counts, strict=True)
        if len(x)
    ]
    return combine(torch.cat(outputs) if outputs else x_ND.new_empty(0, x_ND.shape[1]), gate_NK, plan)
