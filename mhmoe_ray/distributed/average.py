"""Exponential moving average of the trained weights (`train.ema_decay`), in float32 and sharded like them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mhmoe_ray.model.held import local_shard


class WeightAverage:
    """Average of weights: d * average + (1 - d) * weights after update t, with d = min(decay, (1 + t) / (10 + t)).

    Because d is smaller in the first updates, the average soon forgets the initial weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Begin with the present values of `parameters`."""
        self._parameters, self._decay = parameters, decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        self.updates = 0
        """Number of optimizer updates so far, t."""

    @torch.no_grad()
    def update(self) -> None:
        """Follow an optimizer update."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        averages, weights = self._local_tensors()
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the present weights."""
        for average, weight in zip(*self._local_tensors(), strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the values of the average and the weights."""
        for average, weight in zip(*self._local_tensors(), strict=True):
            weight_copy = weight.clone()
            weight.copy_(average)
            average.copy_(weight_copy)

    def _local_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's values of the averages and of the weights."""
        averages = [local_shard(t) for t in self.tensors.values()]
        return averages, [local_shard(p.detach()) for p in self._parameters.values()]
