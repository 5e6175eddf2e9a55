"""A stack of experts: the function that one of them is, and its weights stacked over experts."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class ExpertWeights(NamedTuple):
    """E experts of one kind. Matrices have the layout [E, out, in], which is what F.linear takes per expert."""

    function: Callable[..., Tensor]
    """(x_ND, *weights of one expert) -> y_ND, for any N, 0 included."""
    stacked: tuple[Tensor, ...]
    """The function's weights, each [E, ...], in the order of its arguments."""
    recompute: float = 0.0
    """Share of the routes whose hidden rows are computed anew in the backward rather than kept, where a backend keeps
    any."""


def swiglu(x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) without biases (P2's experts, and LLaMA's dense layer)."""
    return F.linear(F.silu(F.linear(x_ND, gate_FD)) * F.linear(x_ND, up_FD), down_DF)


def gelu_subln(
    x_ND: Tensor,
    fc1_FD: Tensor,
    fc1_bias_F: Tensor,
    norm_weight_F: Tensor,
    norm_bias_F: Tensor,
    fc2_DF: Tensor,
    fc2_bias_D: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """fc2(norm(gelu(fc1(x)))) with biases and SubLN's inner LayerNorm (P1's experts and dense layer).

    GELU in float32 or wider, as the first paper's code.
    """
    hidden_NF = F.linear(x_ND, fc1_FD, fc1_bias_F)
    wide = hidden_NF.double() if hidden_NF.dtype.itemsize == 8 else hidden_NF.float()
    normed_NF = F.layer_norm(F.gelu(wide).to(x_ND.dtype), norm_weight_F.shape, norm_weight_F, norm_bias_F, eps)
    return F.linear(normed_NF, fc2_DF, fc2_bias_D)
