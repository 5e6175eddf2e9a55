"""Losses of encoders and vision models. Their micro-batches have parts: training objectives, each with its own data."""

from typing import NamedTuple

from torch import Tensor

from mhmoe_ray.model.router import Routing


class LossPart(NamedTuple):
    """One of the losses of a micro-batch, float32."""

    sum: Tensor
    """Sum of the loss over its prediction targets, a scalar with gradients."""
    value_I: Tensor
    """Loss of each prediction target, without gradients."""


class PartLosses(NamedTuple):
    """Losses of all parts of a micro-batch, and how its rows were routed to experts."""

    losses: list[LossPart]
    """Losses of the parts, one part after another, in the order of a part's kinds of loss."""
    routing: list[Routing]
    """Routing of each mixture-of-experts layer, from the first to the last."""
