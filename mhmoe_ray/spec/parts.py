"""The parts of a micro-batch, each with sources, an objective and losses of its own."""

from typing import NamedTuple

from mhmoe_ray.spec.formats import Column
from mhmoe_ray.spec.objectives import OBJECTIVES, LossKind, Objective, ObjectiveTraits

DETECTION_LOSSES = ("objectness", "proposals", "classes", "boxes", "masks")
"""Losses of a detector: whether anchors have objects, the edges of proposals, the classes and the edges of boxes, and
their masks."""


class MicroBatchPart(NamedTuple):
    """Part of every micro-batch."""

    name: str
    """Name of the part; empty for the only part of a spec without parts."""
    sources: tuple[str, ...]
    samples: int
    """Number of its samples in a micro-batch."""
    objective: Objective
    columns: tuple[Column, ...]
    """Columns of its samples, in the order of their names."""
    weight: float
    """Factor of its losses in the loss of an encoder or a vision model."""
    has_masks: bool = False
    """True if it trains a detector with masks."""

    @property
    def traits(self) -> ObjectiveTraits:
        """The properties of its objective."""
        return OBJECTIVES[self.objective]

    @property
    def is_joint(self) -> bool:
        """True if its samples are pairs of an image and a text, over both of which attention is."""
        return len(self.columns) > 1 and not self.traits.compares

    @property
    def masking_keys(self) -> tuple[str, ...]:
        """The keys of `train.masking` with the shares that it hides."""
        if not self.traits.hides:
            return ()
        return self.columns if len(self.columns) == 1 else tuple(f"pair_{column}" for column in self.columns)

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of its losses: a masked pair of image and text has one for each of them."""
        if self.traits.hides and len(self.columns) > 1:
            return tuple(f"{self.name}_{column}" for column in self.columns)
        if self.objective == "detect":
            return tuple(f"{self.name}_{kind}" for kind in DETECTION_LOSSES if kind != "masks" or self.has_masks)
        return (self.name,)

    @property
    def loss_kinds(self) -> tuple[LossKind, ...]:
        """The kind of each of its losses, if its model is an encoder."""
        if self.traits.loss is not None:
            return (self.traits.loss,)
        return tuple(kind for kind in ("image", "text") if kind in self.columns)
