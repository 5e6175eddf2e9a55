"""The functions that experts compute, and the weights of several experts, stacked along the first dimension."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.abilities import ExpertFunction


class LowRankSum(NamedTuple):
    """Matrix with a low-rank adapter, W + scale * B A."""

    weight_OI: Tensor
    a_ZI: Tensor
    b_OZ: Tensor
    scale: float


def _linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Multiply rows by a matrix, which may be a `LowRankSum`."""
    if not isinstance(weight_OI, LowRankSum):
        return F.linear(x_NI, weight_OI, bias_O)
    y_NO = F.linear(x_NI, weight_OI.weight_OI, bias_O)
    return y_NO + F.linear(F.linear(x_NI, weight_OI.a_ZI), weight_OI.b_OZ) * weight_OI.scale


@dataclass(frozen=True)
class Swiglu:
    """SwiGLU, down(silu(gate(x)) * up(x)), without biases, as in LLaMA and in the experts of arXiv 2411.16205."""

    name: ClassVar[ExpertFunction] = "swiglu"

    def __call__(self, x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        return _linear(F.silu(_linear(x_ND, gate_FD)) * _linear(x_ND, up_FD), down_DF)


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
        gelu_NF = F.gelu(_linear(x_ND, fc1_FD, fc1_bias_F))
        normed_NF = F.layer_norm(gelu_NF, norm_weight_F.shape, norm_weight_F, norm_bias_F, self.eps)
        return _linear(normed_NF, fc2_DF, fc2_bias_D)


@dataclass(frozen=True)
class Gelu:
    """GELU, fc2(gelu(fc1(x))), with biases, as in the vision transformer (ViT, arXiv 2010.11929)."""

    name: ClassVar[ExpertFunction] = "gelu"

    def __call__(self, x_ND: Tensor, fc1_FD: Tensor, fc1_bias_F: Tensor, fc2_DF: Tensor, fc2_bias_D: Tensor) -> Tensor:
        return _linear(F.gelu(_linear(x_ND, fc1_FD, fc1_bias_F)), fc2_DF, fc2_bias_D)


@dataclass(frozen=True)
class Adapted:
    """Function whose matrices have low-rank adapters (LoRA, arXiv 2106.09685), or whose weights are only frozen.

    Its arguments are those of the function, and then A and B of each adapter, [rank, in] and [out, rank].
    """

    function: Swiglu | GeluSubln
    positions: tuple[int, ...]
    """Positions of the adapters' matrices among the function's weights."""
    scale: float

    @property
    def name(self) -> ExpertFunction:
        return self.function.name

    def __call__(self, x_ND: Tensor, *weights: Tensor) -> Tensor:
        count = len(weights) - 2 * len(self.positions)
        summed_weights, adapters = list(weights[:count]), iter(weights[count:])
        for position in self.positions:
            summed = LowRankSum(weights[position], next(adapters), next(adapters), self.scale)
            summed_weights[position] = cast("Tensor", summed)
        return self.function(x_ND, *summed_weights)


Function = Swiglu | GeluSubln | Gelu | Adapted
"""Function (x_ND, *weights) -> y_ND of an expert or a dense layer, for any N, including 0."""


class ExpertWeights(NamedTuple):
    """Weights of E experts of one kind; matrices are [E, out, in], as in F.linear."""

    function: Function
    stacked: tuple[Tensor, ...]
    """Weights of the function, each [E, ...], in the order of its arguments."""
    recompute: float = 0.0
    """Share of the routes whose hidden activations the backward recomputes, if the backend keeps any."""
