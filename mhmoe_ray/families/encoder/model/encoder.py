"""The encoder: embeddings of images and texts, blocks, and a head for each kind of loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_ray.families.encoder.model.batch import EncoderBatch
from mhmoe_ray.families.encoder.model.block import EncoderBlock
from mhmoe_ray.families.encoder.model.heads import answer_head, answer_losses, comparison_head, comparison_losses
from mhmoe_ray.families.encoder.model.match import MatchHead
from mhmoe_ray.families.encoder.model.samples import attention_masks
from mhmoe_ray.families.images.part_losses import LossPart, PartLosses
from mhmoe_ray.families.images.patches import image_patches
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.autocast import matmul_dtype
from mhmoe_ray.model.noise import EMBEDDING, Noise, dropout
from mhmoe_ray.model.router import Routing
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import LossKind, ModelSpec


class Encoded(NamedTuple):
    """Outputs of the encoder's last norms for a micro-batch."""

    image_NSM: Tensor
    """Outputs at position 0, which stands for the image as a whole, and at its patches."""
    text_NTM: Tensor
    routing: list[Routing]
    """Routing of each mixture-of-experts layer, from the first to the last."""
    whole_NM: Tensor
    """Output of the last block at position 0 of each image, without the last norm."""


CLASS_LOSSES: dict[LossKind, Callable[[Tensor, Tensor], Tensor]] = {
    "answer": answer_losses,
    "compare": comparison_losses,
}
"""Losses of questions and sentences, from logits and labels."""


class Encoder(Trunk):
    """Encoder of images and texts.

    Its weights are uninitialized: call `model.init.init_weights` or load a checkpoint next. `expert_ids` are the
    experts that this process holds in every layer, by default all.
    """

    def __init__(self, spec: ModelSpec, expert_ids: range | None = None) -> None:
        super().__init__(spec)
        encoder, d = spec.encoder, spec.d_model
        assert encoder is not None
        self.patch_size, self.image_tokens = encoder.patch_size, encoder.image_tokens
        self.patch_projection = nn.Linear(encoder.patch_values, d)
        self.image_embedding = nn.Embedding(1, d)
        """Learned input at the extra position that stands for an image as a whole."""
        self.hidden_embedding = nn.Embedding(1, d)
        """Learned input that replaces a hidden patch."""
        self.image_position_embedding = nn.Embedding(encoder.image_positions or encoder.image_tokens, d)
        self.embedding = nn.Embedding(spec.vocab_size, d)
        self.text_position_embedding = nn.Embedding(encoder.text_positions, d)
        self.blocks = nn.ModuleList(EncoderBlock(spec, i, expert_ids) for i in range(spec.layers))
        self.image_norm, self.text_norm = modules_of(spec).norm(spec), modules_of(spec).norm(spec)
        self.output = nn.ModuleDict(
            {"image": nn.Linear(d, encoder.target_values), "text": nn.Linear(d, spec.vocab_size)}
        )
        self.match: MatchHead | None = None if encoder.d_match is None else MatchHead(d, encoder.d_match)
        self.answer: nn.Sequential | None = None if encoder.answers is None else answer_head(d, encoder.answers)
        self.compare: nn.Sequential | None = comparison_head(d) if encoder.compares else None

    def final_norms(self) -> list[nn.Module]:
        return [self.image_norm, self.text_norm]

    def forward(self, batch: EncoderBatch, noise: Noise | None = None) -> PartLosses:
        """Return the losses and the routing of a micro-batch; `noise` is a training step's randomness, else None."""
        encoded = self.encode(batch, noise)
        return PartLosses(self._losses(batch, encoded), encoded.routing)

    def encode(self, batch: EncoderBatch, noise: Noise | None = None) -> Encoded:
        """Return the outputs of the last norms for a micro-batch."""
        active_noise = noise if self.is_random else None
        image_NSM, text_NTM = self._embed(batch, active_noise)
        # Blocks get only the sizes of the batch's groups of samples. If compiled blocks depended on the numbers of
        # hidden patches and tokens, they would be compiled again for almost every micro-batch.
        sizes = [group.size for group in batch.groups]
        masks = attention_masks(sizes, batch.is_token_NT, self.image_tokens, matmul_dtype(image_NSM))
        [image_NSM, text_NTM], routings = self.run_blocks(
            image_NSM, text_NTM, noise=active_noise, sizes=sizes, masks=masks
        )
        image_NSM, text_NTM = widen(image_NSM), widen(text_NTM)
        return Encoded(self.image_norm(image_NSM), self.text_norm(text_NTM), routings, image_NSM[:, 0])

    def class_logits(self, kind: LossKind, encoded: Encoded, images: slice, texts: slice) -> Tensor:
        """Return the logits of answers (kind answer) or of false and true (compare) for a group's samples."""
        head, input_NW = self.answer, encoded.whole_NM[images]
        if kind == "compare":
            first_NW = torch.cat([encoded.image_NSM[images, 0], encoded.text_NTM[texts, 0]], 1)
            head, input_NW = self.compare, first_NW.reshape(-1, 2 * first_NW.shape[1])
        assert head is not None
        logits: Tensor = head(input_NW)
        return logits

    def _embed(self, batch: EncoderBatch, noise: Noise | None) -> tuple[Tensor, Tensor]:
        # Pixels are scaled to the range from -1 to 1, as in BEiT.
        patch_NPM = widen(self.patch_projection(2 * image_patches(batch.image_NYXC, self.patch_size) - 1))
        hidden_M = widen(self.hidden_embedding.weight[0])
        patch_NPM = torch.where(batch.patch_hidden_NP[..., None], hidden_M, patch_NPM)
        whole_N1M = widen(self.image_embedding.weight).expand(len(patch_NPM), 1, -1)
        image_NSM = torch.cat([whole_N1M, patch_NPM], 1) + self.image_position_embedding.weight[: self.image_tokens]
        text_NTM = widen(self.embedding(batch.token_NT))
        text_NTM = text_NTM + self.text_position_embedding.weight[: text_NTM.shape[1]]
        generator = None if noise is None else noise.generator(EMBEDDING, image_NSM.device)
        return dropout(image_NSM, self.spec.dropout, generator), dropout(text_NTM, self.spec.dropout, generator)

    def _losses(self, batch: EncoderBatch, encoded: Encoded) -> list[LossPart]:
        """Return the losses of each group, one group after another."""
        groups, image_NSM, text_NTM = batch.groups, encoded.image_NSM, encoded.text_NTM
        hidden_IM = image_NSM[:, 1:].flatten(0, 1)[batch.hidden_patch_I]
        patch_values = _patch_losses(self.output["image"](hidden_IM).float(), batch.patch_target_I)
        hidden_JM = text_NTM.flatten(0, 1)[batch.hidden_token_J]
        token_values = F.cross_entropy(self.output["text"](hidden_JM).float(), batch.token_target_J, reduction="none")
        patch_parts = torch.split(patch_values, [group.hidden_patches for group in groups])
        token_parts = torch.split(token_values, [group.hidden_tokens for group in groups])
        values = []
        first_image = first_text = first_label = 0
        for group, patch_part, token_part in zip(groups, patch_parts, token_parts, strict=True):
            images = slice(first_image, first_image + group.size.images)
            texts = slice(first_text, first_text + group.size.texts)
            first_image, first_text = images.stop, texts.stop
            for kind in group.losses:
                if kind == "match":
                    assert self.match is not None
                    values.append(self.match(image_NSM[images, 0], text_NTM[texts, 0]))
                elif kind in CLASS_LOSSES:
                    assert batch.label_QL is not None
                    logits = self.class_logits(kind, encoded, images, texts)
                    label_QL = batch.label_QL[first_label : (first_label := first_label + len(logits))]
                    values.append(CLASS_LOSSES[kind](logits, label_QL))
                else:
                    values.append(patch_part if kind == "image" else token_part)
        parts = [LossPart(value_I.sum(), value_I.detach()) for value_I in values]
        # If there are no patches or no tokens to predict, their output head gets gradients of zeros, because
        # distributed strategies expect a gradient for every weight.
        unused_heads = patch_values[:0].sum() + token_values[:0].sum()
        return [parts[0]._replace(sum=parts[0].sum + unused_heads), *parts[1:]]


def _patch_losses(output_IV: Tensor, target_I: Tensor) -> Tensor:
    """Return the loss of each patch: mean squared error of pixels, or cross-entropy of its codebook entry in nats."""
    if target_I.is_floating_point():
        return (output_IV - target_I).square().mean(-1)
    return F.cross_entropy(output_IV, target_I, reduction="none")
