"""Linear layers of a block. They take a random generator, which only those with an adapter use."""

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """Linear layer without an adapter."""

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().forward(x)


class Projection(nn.Sequential):
    """Linear layers with ReLU between them; without layers, it returns its input."""

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        for layer in self:
            x = layer(x, generator) if isinstance(layer, Linear) else layer(x)
        return x
