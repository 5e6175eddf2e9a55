"""Micro-batches of an encoder: from samples in CPU memory to the tensors that the model takes, with their targets."""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mhmoe_ray.data.family import PartSamples
from mhmoe_ray.data.shards.columns import padding_token, token_bytes_for
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.families.encoder.model import EncoderBatch, Group, GroupSize
from mhmoe_ray.families.images.patches import image_patches
from mhmoe_ray.model.transfer import copy_to_device
from mhmoe_ray.spec import MicroBatchPart, ModelSpec


def evaluated_samples(part: MicroBatchPart, samples: PartSamples[EncoderSamples]) -> int:
    """Return how many samples of a part an evaluation uses, counted from the first one.

    If the objective compares images with texts and there are enough samples, only full micro-batches are used: a
    smaller one has fewer pairs to choose from, and so a smaller loss.
    """
    count = samples.sample_count
    if part.traits.compares and count > part.samples:
        count -= count % part.samples
    return count


def normalized_patches(patch_IV: Tensor) -> Tensor:
    """Return patches, each normalized by the mean and the standard deviation of its values (MAE, arXiv 2111.06377)."""
    # An empty tensor is returned at once, because torch warns about its variance.
    if not len(patch_IV):
        return patch_IV
    variance_I1, mean_I1 = torch.var_mean(patch_IV, dim=-1, keepdim=True)
    return (patch_IV - mean_I1) / (variance_I1 + 1e-6).sqrt()


class BatchMaker:
    """Maker of an encoder's micro-batches; `codebook` is float32 (entries, values), None if no target is an entry."""

    def __init__(self, spec: ModelSpec, device: torch.device, codebook: np.ndarray | None = None) -> None:
        assert spec.encoder is not None
        self._predicts_entries = spec.encoder.image_targets == "codebook"
        self._patch_size, self._device = spec.encoder.patch_size, device
        self._padding = padding_token(token_bytes_for(spec.vocab_size))
        self._codebook = None if codebook is None else copy_to_device(codebook, device)

    def make(self, parts: Iterable[MicroBatchPart], samples: EncoderSamples) -> EncoderBatch:
        """Return the samples of all parts, in the parts' order, as a micro-batch on the device with its targets."""
        transfer = partial(copy_to_device, device=self._device)
        hidden_patch_I, hidden_token_J = (
            np.flatnonzero(mask) for mask in (samples.patch_hidden, samples.token_predicted)
        )
        is_token = samples.inputs != self._padding
        token_NT = np.where(is_token, samples.inputs, 0).astype(np.int64)
        parts = list(parts)
        target_J = self._predicted_tokens(parts, samples.tokens).ravel()[hidden_token_J].astype(np.int64)
        image_NYXC, patch_I = transfer(samples.images), transfer(hidden_patch_I)
        return EncoderBatch(
            tuple(_groups(parts, samples)),
            image_NYXC,
            transfer(samples.patch_hidden),
            transfer(token_NT),
            transfer(is_token),
            patch_I,
            self._patch_targets(image_NYXC, patch_I),
            transfer(hidden_token_J),
            transfer(target_J),
            transfer(samples.labels),
        )

    def _predicted_tokens(self, parts: Iterable[MicroBatchPart], token_NT: np.ndarray) -> np.ndarray:
        """Return the token to predict at each position, (N, T): the token itself, or in captions the next token.

        At the end of a caption it is the start token, which occurs nowhere else in a text.
        """
        predicted_NT, first_text = token_NT, 0
        for part in parts:
            texts = slice(first_text, first_text := first_text + part.pairs * ("text" in part.columns))
            if part.traits.writes:
                next_BT = np.roll(token_NT[texts], -1, axis=1)
                start_B1 = token_NT[texts, :1]
                predicted_NT = predicted_NT.copy()
                predicted_NT[texts] = np.where(next_BT == self._padding, start_B1, next_BT)
        return predicted_NT

    def _patch_targets(self, image_NYXC: Tensor, hidden_patch_I: Tensor) -> Tensor:
        if self._predicts_entries and self._codebook is None:
            assert not len(hidden_patch_I), "without its codebook, an encoder predicts no patches"
            return hidden_patch_I
        hidden_IV = image_patches(image_NYXC, self._patch_size).flatten(0, 1)[hidden_patch_I]
        target_IV = normalized_patches(hidden_IV)
        return target_IV if self._codebook is None else torch.cdist(target_IV, self._codebook).argmin(1)


def _groups(parts: Iterable[MicroBatchPart], samples: EncoderSamples) -> Iterator[Group]:
    first_image = first_text = 0
    for part in parts:
        images, texts = (part.pairs * (column in part.columns) for column in ("image", "text"))
        patch_hidden = samples.patch_hidden[first_image : first_image + images]
        token_predicted = samples.token_predicted[first_text : first_text + texts]
        first_image, first_text = first_image + images, first_text + texts
        size = GroupSize(images, texts, part.is_joint, is_causal=part.traits.writes)
        yield Group(size, int(patch_hidden.sum()), int(token_predicted.sum()), part.loss_kinds)
