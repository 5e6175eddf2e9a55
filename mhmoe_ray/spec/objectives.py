"""The objectives of parts of a micro-batch, and their properties."""

from typing import TYPE_CHECKING, Literal, NamedTuple

LossKind = Literal["image", "text", "match", "caption"]
"""Kind of a loss of an encoder: of hidden patches, of hidden tokens, of matching images with texts, or of the tokens of
captions."""


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
