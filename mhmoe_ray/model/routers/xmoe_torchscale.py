"""W x . e / |e| in 16 dimensions: what torchscale computes under X-MoE's name, and P1 ran. The row's side is not
normalised and there is no temperature."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import wide
from mhmoe_ray.model.routers.base import BaseScores
from mhmoe_ray.spec import MoESpec


class TorchscaleScores(BaseScores):
    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ wide(self.reduce_QD).T @ F.normalize(wide(self.expert_EQ), dim=-1, eps=1e-4).T
