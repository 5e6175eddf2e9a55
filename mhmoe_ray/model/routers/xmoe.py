"""cos(W x, e) / tau with a learnable temperature tau, as published (X-MoE, arXiv 2204.09179).

How tau is held is not published. As a plain parameter it can reach 0 within 500 steps of Adam at a learning rate of
6e-4; there scores are infinite, and past it their order is reversed. So the parameter is log(tau - lowest): tau falls
by a share of itself, and never below Tutel's bound (a scale of at most 100).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import wide
from mhmoe_ray.model.routers.base import BaseScores
from mhmoe_ray.spec import MoESpec

INITIAL_TEMPERATURE = 0.3
LOWEST_TEMPERATURE = 0.01


class XMoEScores(BaseScores):
    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))
        self.log_temperature = nn.Parameter(torch.empty(1))  # FSDP2 and DeepSpeed take no scalars

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.cosine(x_ND) / self.temperature

    def balanced(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """X-MoE's loss divides by the initial temperature, not by the learnt one, which could otherwise grow to please
        it."""
        return (self.cosine(x_ND) / INITIAL_TEMPERATURE).softmax(-1)

    @property
    def temperature(self) -> Tensor:
        return LOWEST_TEMPERATURE + wide(self.log_temperature).exp()

    def cosine(self, x_ND: Tensor) -> Tensor:
        return F.normalize(x_ND @ wide(self.reduce_QD).T, dim=-1) @ F.normalize(wide(self.expert_EQ), dim=-1).T
