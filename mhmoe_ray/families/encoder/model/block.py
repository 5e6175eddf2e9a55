"""Block of the encoder: weights for images and for texts, joint attention, and experts for both."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels import widen
from mhmoe_ray.families.encoder.model.batch import GroupSize
from mhmoe_ray.families.encoder.model.samples import join_samples, split_samples
from mhmoe_ray.model.branch import Branch
from mhmoe_ray.model.moe import MoELayer, MultiHeadMoE
from mhmoe_ray.model.noise import default_generator_from, dropout
from mhmoe_ray.model.recompute import recompute_in_backward
from mhmoe_ray.model.router import Routing
from mhmoe_ray.model.smear import MergedExperts
from mhmoe_ray.model.trunk import TrunkBlock, add_residual
from mhmoe_ray.spec import ModelSpec


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
        """Return the block's outputs for images and for texts, and its routing if it has experts.

        `masks` are the `attention_masks` of the samples. `create_generator` returns a new generator in the same state
        at each call, or None in evaluation. With `recompute`, the backward recomputes the attention part.
        """

        def run_attention(image_NSM: Tensor, text_NTM: Tensor) -> tuple[Tensor, Tensor, torch.Generator | None]:
            # The backward may run this again and must then draw the same numbers, so each run creates a new generator.
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
            # `self.moe` itself applies dropout, to each expert's output.
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
        """Return the attention outputs of images and of texts; attention runs over whole samples where masks allow."""
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
        """Return the attention output of one set of samples, (B, U, H, C)."""
        q, k, v = (t.transpose(1, 2) for t in heads)
        dropout_rate = self.attention_dropout if generator is not None else 0.0
        with default_generator_from(generator if dropout_rate else None):
            y_BHUC = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_rate)
        return y_BHUC.transpose(1, 2)
