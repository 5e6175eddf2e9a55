"""The weights of a stack of SwiGLU experts: down(silu(gate(x)) * up(x)), without biases."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class ExpertWeights(NamedTuple):
    """Layout [E, out, in], which is what F.linear takes per expert."""

    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor


def swiglu(x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """One expert (or one dense feed-forward layer) on the rows it was given."""
    return F.linear(F.silu(F.linear(x_ND, gate_FD)) * F.linear(x_ND, up_FD), down_DF)
