"""Micro-batches of the encoder: groups of images, texts, or pairs."""

from typing import NamedTuple

from torch import Tensor

from mhmoe_ray.spec import LossKind


class GroupSize(NamedTuple):
    """Numbers of images and texts in a group of samples, and how attention connects them."""

    images: int
    """Number of images. In the tensor of all images, they lie after those of earlier groups."""
    texts: int
    """Number of texts. In the tensor of all texts, they lie after those of earlier groups."""
    is_joint: bool
    """True if image i and text i of the group form one sample, so that attention runs over both."""
    is_causal: bool = False
    """True for captions: an image attends only to itself, and a token to its image, to itself and to earlier tokens."""


class Group(NamedTuple):
    """Samples of a micro-batch that are encoded in the same way and have the same losses.

    A group belongs to one part of the micro-batch, that is, to one training objective with its data.
    """

    size: GroupSize
    hidden_patches: int
    """Number of hidden patches that the model must predict, in all images of the group."""
    hidden_tokens: int
    """Number of tokens that the model must predict, in all texts of the group."""
    losses: tuple[LossKind, ...]
    """Kinds of loss that the group has. `match` compares image i with text i."""

    @property
    def target_counts(self) -> list[int]:
        """The number of prediction targets of each loss: hidden patches, pairs or tokens."""
        counts: dict[LossKind, int] = {"image": self.hidden_patches, "match": self.size.images}
        return [counts.get(kind, self.hidden_tokens) for kind in self.losses]


class EncoderBatch(NamedTuple):
    """Micro-batch of an encoder. `groups` tells which images and texts belong together, one group after another."""

    groups: tuple[Group, ...]
    image_NYXC: Tensor
    """Images, uint8, (images, image_size, image_size, 3)."""
    patch_hidden_NP: Tensor
    """Mask of the patches that are hidden from the model, bool, (images, patches)."""
    token_NT: Tensor
    """Token ids of texts, int64, (texts, T). Hidden tokens are already replaced; padding may be any token."""
    is_token_NT: Tensor
    """Mask, bool, (texts, T): True for tokens, False for padding."""
    hidden_patch_I: Tensor
    """Indices of the patches to predict among all patches of all images, ascending, int64."""
    patch_target_I: Tensor
    """Targets of the patches in `hidden_patch_I`: normalized pixels, float32 (I, values), or the numbers of the closest
    entries of a codebook of patches, int64 (I,)."""
    hidden_token_J: Tensor
    """Indices of the positions at which a token is predicted, among the positions of all texts, ascending, int64. They
    are the positions of hidden tokens and, for captions, the position before each token."""
    token_target_J: Tensor
    """Token ids to predict at the positions in `hidden_token_J`, int64."""
