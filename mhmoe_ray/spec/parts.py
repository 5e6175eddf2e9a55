"""The parts of a micro-batch, each with sources, an objective and losses of its own."""

from typing import Literal, NamedTuple

from mhmoe_ray.spec.data import Column, Objective

LossKind = Literal["image", "text", "match", "caption"]
"""Kind of a loss of an encoder: of hidden patches, of hidden tokens, of matching images with texts, or of the tokens of
captions."""
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
    def masking_keys(self) -> tuple[str, ...]:
        """The keys of `train.masking` with the shares that it hides."""
        if self.objective != "masked":
            return ()
        return self.columns if len(self.columns) == 1 else tuple(f"pair_{column}" for column in self.columns)

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of its losses: a masked pair of image and text has one for each of them."""
        if self.objective == "masked" and len(self.columns) > 1:
            return tuple(f"{self.name}_{column}" for column in self.columns)
        if self.objective == "detect":
            return tuple(f"{self.name}_{kind}" for kind in DETECTION_LOSSES if kind != "masks" or self.has_masks)
        return (self.name,)

    @property
    def loss_kinds(self) -> tuple[LossKind, ...]:
        """The kind of each of its losses, if its model is an encoder."""
        if self.objective == "contrastive":
            return ("match",)
        if self.objective == "caption":
            return ("caption",)
        return tuple(kind for kind in ("image", "text") if kind in self.columns)
