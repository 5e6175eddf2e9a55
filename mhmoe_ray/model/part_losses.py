"""Losses of the parts of a micro-batch, of models whose micro-batches have parts."""

from typing import NamedTuple

from torch import Tensor

from mhmoe_ray.model.router import Routing


class LossPart(NamedTuple):
    """One of the losses of a micro-batch, float32."""

    sum: Tensor
    """Sum over its targets, a scalar with gradients."""
    value_I: Tensor
    """Loss of each target, without gradients."""


class PartLosses(NamedTuple):
    """Losses of the parts of a micro-batch."""

    losses: list[LossPart]
    """Losses of the groups, one group after another, in the order of `Group.losses`."""
    routing: list[Routing]
    """Routing of each mixture-of-experts layer, from the lowest layer up."""
