"""W x (P1, equation 5; P2, section 2.1)."""

import torch
from torch import Tensor, nn

from mhmoe_kernels import wide
from mhmoe_ray.model.routers.base import BaseScores
from mhmoe_ray.spec import MoESpec


class LinearScores(BaseScores):
    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.weight_ED = nn.Parameter(torch.empty(moe.experts, width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ wide(self.weight_ED).T
