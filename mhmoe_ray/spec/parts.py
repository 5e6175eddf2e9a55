"""Parts of a micro-batch, each with its own sources, objective and losses."""

from typing import NamedTuple

from mhmoe_ray.spec.formats import Column
from mhmoe_ray.spec.objectives import OBJECTIVES, LossKind, Objective, ObjectiveTraits

DETECTION_LOSSES = ("objectness", "proposals", "classes", "boxes", "masks")
"""Losses of a detector: objects in anchors, edges of proposals, and classes, edges and masks of boxes."""


class MicroBatchPart(NamedTuple):
    """Part of every micro-batch: samples of some sources, which are trained with one objective."""

    name: str
    """Empty for the only part of a spec without parts."""
    sources: tuple[str, ...]
    samples: int
    objective: Objective
    columns: tuple[Column, ...]
    """Columns of the samples, sorted by name."""
    weight: float
    has_masks: bool = False
    """True if the part trains a detector that also predicts masks."""

    @property
    def traits(self) -> ObjectiveTraits:
        return OBJECTIVES[self.objective]

    @property
    def is_joint(self) -> bool:
        """True if each sample is a pair of an image and a text, with attention over both together."""
        return len(self.columns) > 1 and not self.traits.compares

    @property
    def masking_keys(self) -> tuple[str, ...]:
        """Keys of `train.masking` that set how much the part hides."""
        if not self.traits.hides:
            return ()
        return self.columns if len(self.columns) == 1 else tuple(f"pair_{column}" for column in self.columns)

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the part's losses; a masked pair has one for the image and one for the text."""
        if self.traits.hides and len(self.columns) > 1:
            return tuple(f"{self.name}_{column}" for column in self.columns)
        if self.objective == "detect":
            return tuple(f"{self.name}_{kind}" for kind in DETECTION_LOSSES if kind != "masks" or self.has_masks)
        return (self.name,)

    @property
    def loss_kinds(self) -> tuple[LossKind, ...]:
        if self.traits.loss is not None:
            return (self.traits.loss,)
        return tuple(kind for kind in ("image", "text") if kind in self.columns)
