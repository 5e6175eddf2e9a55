"""The oracle: a loop over experts with masks, written to be read. Any dtype, no care for speed."""

import torch
from torch import Tensor

from mhmoe_kernels.weights import ExpertWeights


def reference(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """See `mhmoe_kernels.run_experts`."""
    y_ND = torch.zeros_like(x_ND)
    for e in range(len(weights.stacked[0])):
        rows, choice = (expert_NK == e).nonzero(as_tuple=True)
        out = weights.function(x_ND[rows], *(w[e] for w in weights.stacked))
        y_ND = y_ND.index_add(0, rows, (out * gate_NK[rows, choice, None]).to(y_ND.dtype))
    return y_ND
