"""Micro-batches of the encoder: groups of images, texts, or pairs."""

from typing import NamedTuple

from torch import Tensor

from mhmoe_ray.spec import LossKind


class GroupSize(NamedTuple):
    """Size of a group of samples."""

    images: int
    """Number of images, which follow those of the groups before it."""
    texts: int
    """Number of texts, which follow those of the groups before it."""
    is_joint: bool
    """True if each image and the text of the same number are one sample, over which attention is."""
    is_causal: bool = False
    """True if images of joint samples attend to themselves alone, and tokens to their image and to tokens before."""


class Group(NamedTuple):
    """Samples of a micro-batch that are encoded in the same way: those of one part of micro-batches."""

    size: GroupSize
    hidden_patches: int
    """Number of patches to predict, in all its images."""
    hidden_tokens: int
    """Number of tokens to predict, in all its texts."""
    losses: tuple[LossKind, ...]
    """Losses of the group. For `match`, each image is matched with the text of the same number."""

    @property
    def target_counts(self) -> list[int]:
        """The number of targets of each loss."""
        counts: dict[LossKind, int] = {"image": self.hidden_patches, "match": self.size.images}
        return [counts.get(kind, self.hidden_tokens) for kind in self.losses]


class EncoderBatch(NamedTuple):
    """Micro-batch of an encoder. Of the groups, each has as many images and texts as it says."""

    groups: tuple[Group, ...]
    image_NYXC: Tensor
    """Images, uint8, (images, image_size, image_size, 3)."""
    patch_hidden_NP: Tensor
    """Mask of the patches that are hidden, bool, (images, patches)."""
    token_NT: Tensor
    """Tokens of texts, int64, (texts, T); hidden ones are replaced already, and padding is any token."""
    is_token_NT: Tensor
    """Mask of the tokens, bool, (texts, T); False for padding."""
    hidden_patch_I: Tensor
    """Indices of the patches to predict among all patches of all images, ascending, int64."""
    patch_target_I: Tensor
    """Targets of these patches: normalized pixels, float32 (I, values), or entries of the codebook, int64 (I,)."""
    hidden_token_J: Tensor
    """Indices of the positions at which a token is predicted, among those of all texts, ascending, int64: positions of
    hidden tokens, and for captions the position before each token."""
    token_target_J: Tensor
    """Tokens to predict at these positions, int64."""
