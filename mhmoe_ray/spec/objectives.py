"""Training objectives that a part of a micro-batch may have, and the properties of each."""

from typing import TYPE_CHECKING, Literal, NamedTuple

LossKind = Literal["image", "text", "match", "caption"]
"""Loss of an encoder on hidden patches, hidden tokens, matches of images with texts, or captions."""


class ObjectiveTraits(NamedTuple):
    """Properties of a training objective, for its samples, its checks and the estimates of `mhmoe plan`."""

    model: Literal["decoder", "encoder", "vision"]
    hides: bool = False
    """True if patches and tokens are hidden in the input, and predicted at their positions."""
    writes: bool = False
    """True if each token and the end of a text are predicted from the image and the earlier tokens."""
    compares: bool = False
    """True if images are compared with all texts of the part in a micro-batch, and encoded apart."""
    loss: LossKind | None = None
    """Kind of the single loss; None if each column has a loss."""

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
