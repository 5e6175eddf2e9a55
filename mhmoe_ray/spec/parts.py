"""Parts of a micro-batch, each with its own sources, objective and losses."""

from typing import NamedTuple

from mhmoe_ray.spec.formats import Column
from mhmoe_ray.spec.objectives import OBJECTIVES, LossKind, Objective, ObjectiveTraits

DETECTION_LOSSES = ("objectness", "proposals", "classes", "boxes", "masks")
"""Names of a detector's losses: whether anchors have objects, the edges of proposals, and the classes, edges and masks
of boxes."""


class MicroBatchPart(NamedTuple):
    """Part of every micro-batch: samples of some sources, which are trained with one objective."""

    name: str
    """Name of the part; empty for the only part of a spec without parts."""
    sources: tuple[str, ...]
    samples: int
    """Number of samples of the part in a micro-batch."""
    objective: Objective
    columns: tuple[Column, ...]
    """Columns of the part's samples (such as image and text), in the order of their names."""
    weight: float
    """Factor of the part's losses in the loss of an encoder or a vision model."""
    has_masks: bool = False
    """True if the part trains a detector that also predicts masks of objects."""

    @property
    def traits(self) -> ObjectiveTraits:
        """The properties of the part's objective."""
        return OBJECTIVES[self.objective]

    @property
    def is_joint(self) -> bool:
        """True if each sample is a pair of an image and a text, and attention is over both together."""
        return len(self.columns) > 1 and not self.traits.compares

    @property
    def masking_keys(self) -> tuple[str, ...]:
        """The keys of `train.masking` that set how much the part hides; none if its objective hides nothing."""
        if not self.traits.hides:
            return ()
        return self.columns if len(self.columns) == 1 else tuple(f"pair_{column}" for column in self.columns)

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of the part's losses: a masked pair of image and text has one loss for each of the two."""
        if self.traits.hides and len(self.columns) > 1:
            return tuple(f"{self.name}_{column}" for column in self.columns)
        if self.objective == "detect":
            return tuple(f"{self.name}_{kind}" for kind in DETECTION_LOSSES if kind != "masks" or self.has_masks)
        return (self.name,)

    @property
    def loss_kinds(self) -> tuple[LossKind, ...]:
        """The kind of each of the part's losses, if the model is an encoder."""
        if self.traits.loss is not None:
            return (self.traits.loss,)
        return tuple(kind for kind in ("image", "text") if kind in self.columns)
