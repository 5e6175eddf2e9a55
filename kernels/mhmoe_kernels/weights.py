"""The functions that experts compute, and the weights of several experts, stacked along the first dimension."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.abilities import ExpertFunction


@dataclass(frozen=True)
class Swiglu:
    """SwiGLU, down(silu(gate(x)) * up(x)), without biases, as in LLaMA and in the experts of arXiv 2411.16205."""

    name: ClassVar[ExpertFunction] = "swiglu"

    def __call__(self, x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x_ND, gate_FD)) * F.linear(x_ND, up_FD), down_DF)


@dataclass(frozen=True)
class GeluSubln:
    """GELU with SubLN, fc2(norm(gelu(fc1(x)))), with biases and an inner LayerNorm, as in arXiv 2404.15045."""

    name: ClassVar[ExpertFunction] = "gelu_subln"
    eps: float = 1e-5
    """Value added to the variance in the norm."""

    def __call__(
        self,
        x_ND: Tensor,
        fc1_FD: Tensor,
        fc1_bias_F: Tensor,
        norm_weight_F: Tensor,
        norm_bias_F: Tensor,
        fc2_DF: Tensor,
        fc2_bias_D: Tensor,
    ) -> Tensor:
        # The code of arXiv 2404.15045 computes GELU in float32. torch does the same for narrower dtypes and rounds
        # once, so no cast is needed.
        gelu_NF = F.gelu(F.linear(x_ND, fc1_FD, fc1_bias_F))
        normed_NF = F.layer_norm(gelu_NF, norm_weight_F.shape, norm_weight_F, norm_bias_F, self.eps)
        return F.linear(normed_NF, fc2_DF, fc2_bias_D)


Function = Swiglu | GeluSubln
"""Function (x_ND, *weights) -> y_ND of an expert or a dense layer, for any N, including 0."""


class ExpertWeights(NamedTuple):
    """Weights of E experts of one kind; matrices are [E, out, in], as in F.linear."""

    function: Function
    stacked: tuple[Tensor, ...]
    """Weights of the function, each [E, ...], in the order of its arguments."""
    recompute: float = 0.0
    """Share of the routes whose hidden activations the backward recomputes, if the backend keeps any."""
