"""Training objectives that a part of a micro-batch may have, and the properties of each."""

from typing import TYPE_CHECKING, Literal, NamedTuple

LossKind = Literal["image", "text", "match", "caption"]
"""Kind of a loss of an encoder: the prediction of hidden patches (image), of hidden tokens (text) or of captions, or
the matching of images with texts (match)."""


class ObjectiveTraits(NamedTuple):
    """Properties of a training objective, on which its samples, its checks and the estimates of `mhmoe plan` depend."""

    model: Literal["decoder", "encoder", "vision"]
    """Kind of the models that can be trained with the objective."""
    hides: bool = False
    """True if patches and tokens are hidden in the input, and predicted at their positions."""
    writes: bool = False
    """True if the model writes texts: each token and the end of a text are predicted at the position before, from the
    image and the earlier tokens."""
    compares: bool = False
    """True if each image is compared with all texts of the part in the same micro-batch. Images and texts are then
    encoded separately."""
    loss: LossKind | None = None
    """Kind of the objective's loss, if it has a single one; None if each column (image, text) has a loss."""

    @property
    def needs_pairs(self) -> bool:
        """True if every sample must have an image and a text."""
        return self.writes or self.compares


OBJECTIVES: dict[str, ObjectiveTraits] = {
    "next_token": ObjectiveTraits("decoder"),
    "masked": ObjectiveTraits("encoder", hides=True),
    "contrastive": ObjectiveTraits("encoder", compares=True, loss="match"),
    "caption": ObjectiveTraits("encoder", writes=True, loss="caption"),
    "classify": ObjectiveTraits("vision"),
    "detect": ObjectiveTraits("vision"),
}
"""All objectives by their name in a spec (`data.parts.NAME.objective`)."""
if TYPE_CHECKING:
    Objective = str
else:
    Objective = Literal[tuple(OBJECTIVES)]
