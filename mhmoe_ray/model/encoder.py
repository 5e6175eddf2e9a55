"""The multiway encoder of images and texts (BEiT-3, arXiv 2208.10442), with experts for both.

A micro-batch has groups of samples: images, texts, or pairs of an image and a text. All images of a micro-batch are one
tensor and all texts another. A layer has weights for each of the two, called modalities; attention alone mixes the two
halves of a pair, and the experts of a layer take the rows of all groups in one call:

    images (N, P + 1, M)  norm, projections |  attention of   | norm, feed-forward of images  + | experts of
    texts  (N, T, M)      norm, projections |  each group     | norm, feed-forward of texts   + | both

An image begins with a position of its own, which is never hidden and stands for the image as a whole; a text begins
with its start token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.attention import Attention
from mhmoe_ray.model.autocast import matmul_dtype
from mhmoe_ray.model.feedforward import FeedForward
from mhmoe_ray.model.moe import MoELayer, MultiHeadMoE
from mhmoe_ray.model.noise import EMBEDDING, Noise, default_generator_from, dropout
from mhmoe_ray.model.router import Routing
from mhmoe_ray.model.smear import MergedExperts
from mhmoe_ray.model.trunk import Trunk, TrunkBlock, add_residual, recompute_in_backward
from mhmoe_ray.spec import LossKind, ModelSpec

MAX_MATCH_SCALE = 100.0
"""Largest factor of cosines in the contrastive loss (CLIP, arXiv 2103.00020)."""


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


class LossPart(NamedTuple):
    """One of the losses of a micro-batch, float32."""

    sum: Tensor
    """Sum over its targets, a scalar with gradients."""
    value_I: Tensor
    """Loss of each target, without gradients."""


class PartLosses(NamedTuple):
    """Losses of the parts of a micro-batch."""

    losses: list[LossPart]
    """Losses of the groups, one group after another, in the order of `Group.losses`."""
    routing: list[Routing]
    """Routing of each mixture-of-experts layer, from the lowest layer up."""


class Encoded(NamedTuple):
    """Outputs of the encoder's last norms for a micro-batch."""

    image_NSM: Tensor
    """Outputs of all images: of each image as a whole at position 0, then of its patches."""
    text_NTM: Tensor
    """Outputs of the tokens of all texts."""
    routing: list[Routing]
    """Routing of each mixture-of-experts layer, from the lowest layer up."""


class Branch(nn.Module):
    """Weights of a block for one modality."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = modules_of(spec).norm(spec)
        self.attention = Attention(spec)
        self.ffn_norm = modules_of(spec).norm(spec)
        self.ffn: FeedForward | None = None
        if not spec.is_moe_layer(layer) or spec.has_experts_beside:
            assert spec.d_ff is not None
            self.ffn = FeedForward(spec, spec.d_ff)


class EncoderBlock(TrunkBlock):
    """Block of the encoder: x + attention(norm(x)), then x + feed-forward(norm(x)) + experts(norm(x))."""

    def __init__(self, spec: ModelSpec, layer: int, expert_ids: range | None) -> None:
        super().__init__()
        self.dropout, self.attention_dropout = spec.dropout, spec.attention_dropout
        self.image, self.text = Branch(spec, layer), Branch(spec, layer)
        self.moe: MoELayer | None = None
        if spec.is_moe_layer(layer):
            assert spec.moe is not None
            layer_class = MergedExperts if spec.moe.router == "smear" else MultiHeadMoE
            self.moe = layer_class(spec, expert_ids)

    def forward(
        self,
        image_NSM: Tensor,
        text_NTM: Tensor,
        sizes: Sequence[GroupSize],
        masks: Sequence[Tensor | None],
        create_generator: Callable[[], torch.Generator | None],
        recompute: bool,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """Run the block; return its output for images and for texts, and its routing if it has experts.

        Args:
            image_NSM: positions of all images.
            text_NTM: tokens of all texts.
            sizes: sizes of the groups of the batch.
            masks: `attention_masks` of the samples.
            create_generator: function that returns a new generator of dropout and routing, with the same draws at each
                call; or that returns None in evaluation.
            recompute: whether the backward recomputes the part before the feed-forward layer.
        """

        def run_attention(image_NSM: Tensor, text_NTM: Tensor) -> tuple[Tensor, Tensor, torch.Generator | None]:
            # A recomputation draws the same numbers only from a new generator in its initial state.
            generator = create_generator()
            outputs = self._attend(image_NSM, text_NTM, sizes, masks, generator)
            image_NSM, text_NTM = (
                add_residual(x, dropout(y, self.dropout, generator))
                for x, y in zip((image_NSM, text_NTM), outputs, strict=True)
            )
            return image_NSM, text_NTM, generator

        image_NSM, text_NTM, generator = (
            recompute_in_backward(run_attention, image_NSM, text_NTM)
            if recompute
            else run_attention(image_NSM, text_NTM)
        )
        normed = [branch.ffn_norm(widen(x)) for branch, x in ((self.image, image_NSM), (self.text, text_NTM))]
        outputs = [
            None if branch.ffn is None else dropout(branch.ffn(y), self.dropout, generator)
            for branch, y in zip((self.image, self.text), normed, strict=True)
        ]
        routing = None
        if self.moe is not None:
            # The layer itself applies dropout, on each expert's output.
            expert_outputs: Sequence[Tensor]
            if isinstance(self.moe, MergedExperts):
                samples = join_samples(normed[0], normed[1], sizes)
                if not samples:
                    # FSDP gathers weights on all ranks together, so a rank without samples runs the layer, too.
                    samples, masks = [normed[0][:0]], [None]
                sample_outputs, routing = self.moe(samples, masks, generator)
                expert_outputs = split_samples(sample_outputs, sizes, normed[0], normed[1])
            else:
                rows_1NM = torch.cat([y.flatten(0, 1) for y in normed])[None]
                group_tokens = [y.shape[:2].numel() for y in normed]
                y_1NM, routing = self.moe(rows_1NM, generator, group_tokens=group_tokens)
                parts = torch.split(y_1NM[0], group_tokens)
                expert_outputs = [part.view(y.shape) for part, y in zip(parts, normed, strict=True)]
            outputs = [y if x is None else x + y for x, y in zip(outputs, expert_outputs, strict=True)]
        image_y, text_y = outputs
        assert image_y is not None
        assert text_y is not None
        return add_residual(image_NSM, image_y), add_residual(text_NTM, text_y), routing

    def _attend(
        self,
        image_NSM: Tensor,
        text_NTM: Tensor,
        sizes: Sequence[GroupSize],
        masks: Sequence[Tensor | None],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the attention outputs of images and texts; attention is over whole samples, in both directions."""
        image_heads = self.image.attention.project(self.image.attention_norm(widen(image_NSM)))
        text_heads = self.text.attention.project(self.text.attention_norm(widen(text_NTM)))
        heads = [join_samples(*halves, sizes) for halves in zip(image_heads, text_heads, strict=True)]
        outputs = [
            self._attend_over(sample_heads, mask, generator)
            for sample_heads, mask in zip(zip(*heads, strict=True), masks, strict=True)
        ]
        image_y, text_y = split_samples(outputs, sizes, image_heads[0], text_heads[0])
        return self.image.attention.merge(image_y), self.text.attention.merge(text_y)

    def _attend_over(self, heads: Sequence[Tensor], mask: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Return the attention output (B, U, H, C) of queries, keys and values of the same shape."""
        q, k, v = (t.transpose(1, 2) for t in heads)
        dropout_rate = self.attention_dropout if generator is not None else 0.0
        with default_generator_from(generator if dropout_rate else None):
            y_BHUC = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_rate)
        return y_BHUC.transpose(1, 2)


def join_samples(image_NS: Tensor, text_NT: Tensor, sizes: Sequence[GroupSize]) -> list[Tensor]:
    """Return values at the positions of whole samples, (B, U, ...), for each set of samples of the same kind.

    A group has a set of pairs, or a set of images and a set of texts; sets of images or texts without samples are left
    out.

    Args:
        image_NS: values of all images, (N, S, ...).
        text_NT: values of all texts, (N, T, ...).
        sizes: sizes of the groups of the batch.
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
    """Return the values of all images and those of all texts: the inverse of `join_samples`.

    Args:
        samples: values of the sets of samples.
        sizes: sizes of the groups of the batch.
        image_NS, text_NT: tensors of images and of texts of the shapes of the results.
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
    """Return the mask of each set of samples of `join_samples`, which is added to attention scores, (B, 1, 1, keys) or
    for causal groups (B, 1, queries, keys): 0 for a key, and -inf for padding and for keys that a query must not see.
    It is None for images alone.

    Args:
        sizes: sizes of the groups of the batch.
        is_token_NT: mask of the tokens of all texts.
        image_tokens: number of positions of an image.
        dtype: dtype of the queries.
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
        # The mask is not boolean, because every layer would convert it into one like this.
        mask_BQU = torch.zeros(is_key_BQU.shape, dtype=dtype, device=is_key_BU.device)
        masks.append(mask_BQU.masked_fill_(~is_key_BQU, float("-inf"))[:, None])
    return masks


def image_patches(image_NYXC: Tensor, patch_size: int) -> Tensor:
    """Return the patches of images (N, P, 3 * patch_size^2), float32, from 0 to 1, row by row of the image.

    Args:
        image_NYXC: uint8 images.
        patch_size: height and width of a patch in pixels.
    """
    images, height, width, _ = image_NYXC.shape
    rows, columns = height // patch_size, width // patch_size
    patch_NRpCpC = image_NYXC.view(images, rows, patch_size, columns, patch_size, 3)
    return patch_NRpCpC.transpose(2, 3).reshape(images, rows * columns, 3 * patch_size**2).float() / 255


class Encoder(Trunk):
    """Encoder of images and texts: embeddings, blocks, and a head for each modality."""

    def __init__(self, spec: ModelSpec, expert_ids: range | None = None) -> None:
        """Create the encoder with uninitialized weights. Call `model.init.init_weights` or load a checkpoint next.

        Args:
            spec: the model's sizes and options, with an `encoder`.
            expert_ids: global ids of the experts that this process holds in every layer; by default all.
        """
        super().__init__(spec)
        encoder, d = spec.encoder, spec.d_model
        assert encoder is not None
        self.patch_size, self.image_tokens = encoder.patch_size, encoder.image_tokens
        self.patch_projection = nn.Linear(encoder.patch_values, d)
        self.image_embedding = nn.Embedding(1, d)
        """Input at the position of an image as a whole."""
        self.hidden_embedding = nn.Embedding(1, d)
        """Input at the positions of hidden patches."""
        self.image_position_embedding = nn.Embedding(encoder.image_positions or encoder.image_tokens, d)
        self.embedding = nn.Embedding(spec.vocab_size, d)
        self.text_position_embedding = nn.Embedding(encoder.text_positions, d)
        self.blocks = nn.ModuleList(EncoderBlock(spec, i, expert_ids) for i in range(spec.layers))
        self.image_norm, self.text_norm = modules_of(spec).norm(spec), modules_of(spec).norm(spec)
        self.output = nn.ModuleDict(
            {"image": nn.Linear(d, encoder.target_values), "text": nn.Linear(d, spec.vocab_size)}
        )
        self.match: MatchHead | None = None if encoder.d_match is None else MatchHead(d, encoder.d_match)

    def final_norms(self) -> list[nn.Module]:
        return [self.image_norm, self.text_norm]

    def forward(self, batch: EncoderBatch, noise: Noise | None = None) -> PartLosses:
        """Return the losses of a micro-batch, and the routing of each mixture-of-experts layer.

        Args:
            batch: the micro-batch.
            noise: randomness of a training step, None in evaluation; used only if the spec has any.
        """
        encoded = self.encode(batch, noise)
        return PartLosses(self._losses(batch, encoded.image_NSM, encoded.text_NTM), encoded.routing)

    def encode(self, batch: EncoderBatch, noise: Noise | None = None) -> Encoded:
        """Return the outputs of the last norms for a micro-batch; for the arguments see `forward`."""
        active_noise = noise if self.spec.is_random else None
        image_NSM, text_NTM = self._embed(batch, active_noise)
        # Compiled blocks must not depend on the numbers of hidden patches and tokens, which change all the time.
        sizes = [group.size for group in batch.groups]
        masks = attention_masks(sizes, batch.is_token_NT, self.image_tokens, matmul_dtype(image_NSM))
        if self.residual_dtype is not None:
            image_NSM, text_NTM = image_NSM.to(self.residual_dtype), text_NTM.to(self.residual_dtype)
        routings = []
        for i, block in enumerate(cast("list[EncoderBlock]", self.blocks)):
            recompute_block, recompute_attention = self.recomputed_parts(block)
            create_generator = partial(active_noise.generator, i, image_NSM.device) if active_noise else lambda: None
            run_block: Callable[..., Any] = partial(
                block,
                sizes=sizes,
                masks=masks,
                create_generator=create_generator,
                recompute=recompute_attention,
            )
            image_NSM, text_NTM, routing = (
                recompute_in_backward(run_block, image_NSM, text_NTM)
                if recompute_block
                else run_block(image_NSM, text_NTM)
            )
            if routing is not None:
                routings.append(routing)
        return Encoded(self.image_norm(widen(image_NSM)), self.text_norm(widen(text_NTM)), routings)

    def _embed(self, batch: EncoderBatch, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Return the inputs of the first block for images and texts."""
        # Pixels from -1 to 1, as in BEiT.
        patch_NPM = widen(self.patch_projection(2 * image_patches(batch.image_NYXC, self.patch_size) - 1))
        hidden_M = widen(self.hidden_embedding.weight[0])
        patch_NPM = torch.where(batch.patch_hidden_NP[..., None], hidden_M, patch_NPM)
        whole_N1M = widen(self.image_embedding.weight).expand(len(patch_NPM), 1, -1)
        image_NSM = torch.cat([whole_N1M, patch_NPM], 1) + self.image_position_embedding.weight[: self.image_tokens]
        text_NTM = widen(self.embedding(batch.token_NT))
        text_NTM = text_NTM + self.text_position_embedding.weight[: text_NTM.shape[1]]
        generator = None if noise is None else noise.generator(EMBEDDING, image_NSM.device)
        return dropout(image_NSM, self.spec.dropout, generator), dropout(text_NTM, self.spec.dropout, generator)

    def _losses(self, batch: EncoderBatch, image_NSM: Tensor, text_NTM: Tensor) -> list[LossPart]:
        """Return the losses of each group for the outputs of the last norms."""
        groups = batch.groups
        hidden_IM = image_NSM[:, 1:].flatten(0, 1)[batch.hidden_patch_I]
        patch_values = _patch_losses(self.output["image"](hidden_IM).float(), batch.patch_target_I)
        hidden_JM = text_NTM.flatten(0, 1)[batch.hidden_token_J]
        token_values = F.cross_entropy(self.output["text"](hidden_JM).float(), batch.token_target_J, reduction="none")
        patch_parts = torch.split(patch_values, [group.hidden_patches for group in groups])
        token_parts = torch.split(token_values, [group.hidden_tokens for group in groups])
        values = []
        first_image = first_text = 0
        for group, patch_part, token_part in zip(groups, patch_parts, token_parts, strict=True):
            images = slice(first_image, first_image + group.size.images)
            texts = slice(first_text, first_text + group.size.texts)
            first_image, first_text = images.stop, texts.stop
            for kind in group.losses:
                if kind == "match":
                    assert self.match is not None
                    values.append(self.match(image_NSM[images, 0], text_NTM[texts, 0]))
                else:
                    values.append(patch_part if kind == "image" else token_part)
        parts = [LossPart(value_I.sum(), value_I.detach()) for value_I in values]
        # If no part hides anything, the heads still get gradients, of zeros, as strategies expect of every weight.
        unused_heads = patch_values[:0].sum() + token_values[:0].sum()
        return [parts[0]._replace(sum=parts[0].sum + unused_heads), *parts[1:]]


def _patch_losses(output_IV: Tensor, target_I: Tensor) -> Tensor:
    """Return the loss of each patch: the mean squared error of its pixels, or the cross-entropy of its entry of the
    codebook in nats."""
    if target_I.is_floating_point():
        return (output_IV - target_I).square().mean(-1)
    return F.cross_entropy(output_IV, target_I, reduction="none")


class MatchHead(nn.Module):
    """Head of objective `contrastive`: the cosines of projected images and texts, times a learned factor."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(d_model, width, bias=False), nn.Linear(d_model, width, bias=False)
        # It is a vector of one element, because neither FSDP2 nor DeepSpeed accepts scalars.
        self.log_scale = nn.Parameter(torch.empty(1))

    def image_vectors(self, image_BM: Tensor) -> Tensor:
        """Return the vectors of images, of length 1, (B, W) float32, from the outputs at their first positions."""
        return F.normalize(self.image(image_BM).float())

    def text_vectors(self, text_BM: Tensor) -> Tensor:
        """Return the vectors of texts, of length 1, (B, W) float32, from the outputs at their start tokens."""
        return F.normalize(self.text(text_BM).float())

    def forward(self, image_BM: Tensor, text_BM: Tensor) -> Tensor:
        """Return the loss of each pair in nats: the mean cross-entropies of its text among all texts for its image, and
        of its image among all images for its text (CLIP, arXiv 2103.00020)."""
        image_BW, text_BW = self.image_vectors(image_BM), self.text_vectors(text_BM)
        if not len(image_BM):
            return image_BW.new_empty(0)
        with torch.autocast(image_BM.device.type, enabled=False):
            scale = self.log_scale.float().exp().clamp(max=MAX_MATCH_SCALE)
            logits_BB = scale * image_BW @ text_BW.T
        target_B = torch.arange(len(logits_BB), device=logits_BB.device)
        losses = (F.cross_entropy(logits, target_B, reduction="none") for logits in (logits_BB, logits_BB.T))
        return torch.stack([*losses]).mean(0)
