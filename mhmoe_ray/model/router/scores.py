"""Modules that compute a router's logits in float32 or wider: W x (arXiv 2404.15045, equation 5; arXiv 2411.16205,
section 2.1), or X-MoE's (arXiv 2204.09179) as published or as in torchscale, the library of the first paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_ray.model.router.base import BaseScores
from mhmoe_ray.spec import MoESpec


class LinearScores(BaseScores):
    """Module of router `linear`, whose logits are W x for a row x."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.weight_ED = nn.Parameter(torch.empty(moe.experts, width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ widen(self.weight_ED).T


# X-MoE's initial temperature (arXiv 2204.09179).
INITIAL_TEMPERATURE = 0.3
# Lower bound of the temperature, as in Tutel. At 0 scores would be infinite, and below 0 their order would be reversed.
MIN_TEMPERATURE = 0.01


class XMoEScores(BaseScores):
    """Module of router `xmoe` (arXiv 2204.09179): cosines of projected rows with expert embeddings, divided by a
    learnable temperature."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))
        # The logarithm is the parameter, because the temperature itself could reach 0 within 500 steps of Adam at a
        # learning rate of 6e-4. It is a vector of one element, because neither FSDP2 nor DeepSpeed accepts scalars.
        self.log_temperature = nn.Parameter(torch.empty(1))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.cosine(x_ND) / self.temperature

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        """Return the probabilities NE for X-MoE's balancing loss, at the initial temperature."""
        # At the learned temperature, training could lower the loss just by raising the temperature.
        return (self.cosine(x_ND) / INITIAL_TEMPERATURE).softmax(-1)

    @property
    def temperature(self) -> Tensor:
        return MIN_TEMPERATURE + widen(self.log_temperature).exp()

    def cosine(self, x_ND: Tensor) -> Tensor:
        """Return the cosine of each projected row with each expert, shape NE."""
        return F.normalize(x_ND @ widen(self.reduce_QD).T, dim=-1) @ F.normalize(widen(self.expert_EQ), dim=-1).T


class TorchscaleScores(BaseScores):
    """Module of router `xmoe_torchscale`, X-MoE's as in the code of arXiv 2404.15045: only expert embeddings are
    normalized, and there is no temperature."""

    def __init__(self, width: int, moe: MoESpec) -> None:
        super().__init__(width, moe)
        self.reduce_QD = nn.Parameter(torch.empty(moe.routing_width, width))
        self.expert_EQ = nn.Parameter(torch.empty(moe.experts, moe.routing_width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND @ widen(self.reduce_QD).T @ F.normalize(widen(self.expert_EQ), dim=-1, eps=1e-4).T
