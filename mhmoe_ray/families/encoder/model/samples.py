"""Samples over which attention runs: joining images and texts into samples, splitting them again, and masks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_ray.families.encoder.model.batch import GroupSize


def join_samples(image_NS: Tensor, text_NT: Tensor, sizes: Sequence[GroupSize]) -> list[Tensor]:
    """Join values of images, (N, S, ...), and texts, (N, T, ...), into one tensor (B, U, ...) for each set of samples.

    A group of pairs has one set. Any other group has a set of images and a set of texts, of which an empty one is left
    out.
    """
    image_parts = torch.split(image_NS, [size.images for size in sizes])
    text_parts = torch.split(text_NT, [size.texts for size in sizes])
    samples = []
    for size, image_part, text_part in zip(sizes, image_parts, text_parts, strict=True):
        if size.is_joint:
            samples.append(torch.cat([image_part, text_part], 1))
        else:
            samples += [part for part in (image_part, text_part) if len(part)]
    return samples


def split_samples(
    samples: Sequence[Tensor], sizes: Sequence[GroupSize], image_NS: Tensor, text_NT: Tensor
) -> tuple[Tensor, Tensor]:
    """Split values of samples into those of images and of texts: the inverse of `join_samples`.

    `image_NS` and `text_NT` are any tensors with the shapes of the results.
    """
    image_parts, text_parts = [image_NS[:0]], [text_NT[:0]]
    sample_sets = iter(samples)
    for size in sizes:
        if size.is_joint:
            image_part, text_part = torch.split(next(sample_sets), [image_NS.shape[1], text_NT.shape[1]], 1)
            image_parts.append(image_part)
            text_parts.append(text_part)
            continue
        if size.images:
            image_parts.append(next(sample_sets))
        if size.texts:
            text_parts.append(next(sample_sets))
    return torch.cat(image_parts), torch.cat(text_parts)


def attention_masks(
    sizes: Sequence[GroupSize], is_token_NT: Tensor, image_tokens: int, dtype: torch.dtype
) -> list[Tensor | None]:
    """Return the attention mask of each set of samples of `join_samples`; it is None for images alone.

    A mask is added to attention scores. It is 0 for keys that a query may see, and -inf for other keys and for padding.
    Its shape is (B, 1, queries, keys) for causal groups and (B, 1, 1, keys) for other groups.
    """
    masks: list[Tensor | None] = []
    for size, is_token_BT in zip(sizes, torch.split(is_token_NT, [size.texts for size in sizes]), strict=True):
        if size.images and not size.is_joint:
            masks.append(None)
        if not size.texts and not size.is_joint:
            continue
        is_key_BU = F.pad(is_token_BT, (image_tokens, 0), value=True) if size.is_joint else is_token_BT
        is_key_BQU = is_key_BU[:, None]
        if size.is_causal:
            is_seen_QU = torch.ones(2 * is_key_BU.shape[1:], dtype=torch.bool, device=is_key_BU.device).tril()
            is_seen_QU[:image_tokens, :image_tokens] = True
            is_key_BQU = is_key_BQU & is_seen_QU
        # The mask holds 0 and -inf, because every layer would convert a boolean mask into such a mask.
        mask_BQU = torch.zeros(is_key_BQU.shape, dtype=dtype, device=is_key_BU.device)
        masks.append(mask_BQU.masked_fill_(~is_key_BQU, float("-inf"))[:, None])
    return masks
