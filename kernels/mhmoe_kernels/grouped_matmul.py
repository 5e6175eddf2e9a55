"""Both kinds of experts written over a grouped GEMM, which the caller brings: one product for all experts at once."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.weights import ExpertWeights, Swiglu

Matmul = Callable[[Tensor, Tensor], Tensor]
"""(x_RI, w_EOI) -> y_RO: F.linear of each row with the matrix of its own expert. Rows are sorted by expert."""


def run_grouped(x_RD: Tensor, weights: ExpertWeights, matmul: Matmul) -> Tensor:
    """Sorted rows through their experts; what `run_sorted` computes, for experts that `can_group` accepts.

    Outside autocast, which makes a norm's output float32, and no grouped GEMM takes two dtypes.
    """
    if isinstance(weights.function, Swiglu):
        return _swiglu(matmul, x_RD, *weights.stacked)
    return _gelu_subln(matmul, weights.function.eps, x_RD, *weights.stacked)


def can_group(weights: ExpertWeights) -> bool:
    """Whether the experts' rows are aligned as grouped GEMMs want: to 16 bytes."""
    return all(w.shape[-1] * w.dtype.itemsize % 16 == 0 for w in weights.stacked if w.ndim == 3)


def _swiglu(matmul: Matmul, x_RD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    return matmul(F.silu(matmul(x_RD, gate_EFD)) * matmul(x_RD, up_EFD), down_EDF)


def _gelu_subln(
    matmul: Matmul,
    eps: float,
    x_RD: Tensor,
    fc1_EFD: Tensor,
    fc1_bias_EF: Tensor,
    norm_weight_EF: Tensor,
    norm_bias_EF: Tensor,
    fc2_EDF: Tensor,
    fc2_bias_ED: Tensor,
) -> Tensor:
    # An expert's vector comes to its rows as the product of a one with a matrix of that one column: the gradient, a sum
    # over the expert's rows, is then a grouped GEMM too, which adds in float32. Indexing would add in bfloat16.
    # Eight columns for the alignment.
    one_R8 = F.pad(x_RD.new_ones(x_RD.shape[0], 1), (0, 7))

    def to_rows(v_EF: Tensor) -> Tensor:
        return matmul(one_R8, F.pad(v_EF[..., None], (0, 7)))

    hidden_RF = matmul(x_RD, fc1_EFD) + to_rows(fc1_bias_EF)
    normed_RF = F.layer_norm(F.gelu(hidden_RF), hidden_RF.shape[1:], eps=eps)
    return matmul(normed_RF * to_rows(norm_weight_EF) + to_rows(norm_bias_EF), fc2_EDF) + to_rows(fc2_bias_ED)
