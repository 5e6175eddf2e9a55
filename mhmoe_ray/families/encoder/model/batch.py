"""Micro-batches of the encoder: groups of images, texts, or pairs."""

from typing import NamedTuple

from torch import Tensor

from mhmoe_ray.spec import LossKind


class GroupSize(NamedTuple):
    """Numbers of images and texts in a group, which lie after those of earlier groups, and the form of attention."""

    images: int
    texts: int
    is_joint: bool
    """True if image i and text i form one sample, so that attention runs over both."""
    is_causal: bool = False
    """True for captions: an image attends only to itself, and a token to its image, to itself and to earlier tokens."""


class Group(NamedTuple):
    """Samples of one part of a micro-batch, which are encoded in the same way and have the same losses."""

    size: GroupSize
    hidden_patches: int
    """Number of patches to predict in all images of the group."""
    hidden_tokens: int
    """Number of tokens to predict in all texts of the group."""
    losses: tuple[LossKind, ...]
    """Kinds of loss; `match` compares image i with text i. In `compare`, images 2 i and 2 i + 1 are those of a
    sentence, and texts 2 i and 2 i + 1 are copies of it."""

    @property
    def target_counts(self) -> list[int]:
        """The number of prediction targets of each loss: hidden patches, pairs, questions, sentences or tokens."""
        images = self.size.images
        counts: dict[LossKind, int] = {
            "image": self.hidden_patches,
            "match": images,
            "answer": images,
            "compare": images // 2,
        }
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
    """Targets of `hidden_patch_I`: normalized pixels, float32 (I, values), or nearest codebook entries, int64 (I,)."""
    hidden_token_J: Tensor
    """Ascending indices, int64, of hidden tokens or, in captions, of the position before each token, in all texts."""
    token_target_J: Tensor
    """Token ids to predict at the positions in `hidden_token_J`, int64."""
    label_QL: Tensor | None = None
    """Labels of questions and sentences, int64, as in `EncoderSamples`; None if no group has any."""
