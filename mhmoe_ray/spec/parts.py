"""The parts of a micro-batch, each with sources, an objective and losses of its own."""

from typing import Literal, NamedTuple

from mhmoe_ray.spec.data import Column, Objective

LossKind = Literal["image", "text", "match", "caption"]
"""Kind of a loss of an encoder: of hidden patches, of hidden tokens, of matching images with texts, or of the tokens of
captions."""
DETECTION_LOSSES = ("objectness", "proposals", "classes", "boxes", "masks")
"""Losses of a detector: whether anchors have objects, the edges of proposals, the classes and the edges of boxes, and
their masks."""


class ObjectiveTraits(NamedTuple):
    """Properties of an objective, which its samples, its checks and its plans follow."""

    model: Literal["decoder", "encoder", "vision"]
    """Kind of the models that have it."""
    hides: bool = False
    """True if patches and tokens are hidden, and predicted where they stood."""
    writes: bool = False
    """True if each token of a text, and its end, is predicted at the position before it, from the image and the tokens
    before."""
    compares: bool = False
    """True if each image is compared with all texts of the part in the same micro-batch, so that the two are encoded
    apart."""
    loss: LossKind | None = None
    """Kind of its only loss; None if each of the columns has a loss."""

    @property
    def needs_pairs(self) -> bool:
        """True if its sources need an image and a text."""
        return self.writes or self.compares


OBJECTIVES: dict[Objective, ObjectiveTraits] = {
    "next_token": ObjectiveTraits("decoder"),
    "masked": ObjectiveTraits("encoder", hides=True),
    "contrastive": ObjectiveTraits("encoder", compares=True, loss="match"),
    "caption": ObjectiveTraits("encoder", writes=True, loss="caption"),
    "classify": ObjectiveTraits("vision"),
    "detect": ObjectiveTraits("vision"),
}


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
