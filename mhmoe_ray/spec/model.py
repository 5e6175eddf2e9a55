"""The `model` section: a decoder, an encoder or a vision model with (multi-head) mixture-of-experts layers.

`moe.py` lists the papers' names of sizes; `architectures/` has the options of each architecture.
"""

import math
from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from mhmoe_ray.architectures import ARCHITECTURES, Architecture, ArchitectureName
from mhmoe_ray.families import MODEL_FAMILIES, ModelFamily, ModelKind
from mhmoe_ray.spec.base import HeadCount, LayerCount, OptionalTokenCount, Section, TokenCount, Width
from mhmoe_ray.spec.encoder import EncoderSpec
from mhmoe_ray.spec.moe import MoESpec
from mhmoe_ray.spec.vision import AdaptiveSpec, VisionSpec

AttentionBias = Literal["none", "qkv", "all"]


def default_d_ff(d_model: int) -> int:
    """Return the default hidden width of a dense layer: 8/3 `d_model`, rounded up to a multiple of 128."""
    # 8/3 is LLaMA's factor.
    return math.ceil(d_model * 8 / 3 / 128) * 128


class RopeScaling(Section):
    """Scaling of rotary positions, which lets a model read longer texts than those of its first training."""

    type: Literal["linear", "yarn", "llama3"]
    """Kind of scaling. linear: all positions are divided by the factor. yarn: only low frequencies are scaled, and
    attention is sharpened (arXiv 2309.00071). llama3: only low frequencies are scaled, as in Llama 3.1."""
    factor: float = Field(ge=1)
    """Ratio of the new context length to the original one."""
    original_length: TokenCount | None = None
    """Context length of the first training; required for yarn and llama3."""
    beta_fast: PositiveFloat = 32.0
    """yarn: frequencies with more turns than this number within the original length are not scaled."""
    beta_slow: PositiveFloat = 1.0
    """yarn: frequencies with fewer turns than this number within the original length are scaled fully."""
    attention_factor: PositiveFloat | None = None
    """yarn: factor by which rotated queries and keys are multiplied; by default 0.1 ln(factor) + 1."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: frequencies with fewer turns than this number within the original length are scaled fully."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: frequencies with more turns than this number within the original length are not scaled."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        yarn_keys, llama3_keys = ["attention_factor", "beta_fast", "beta_slow"], ["high_freq_factor", "low_freq_factor"]
        ignored_keys = {
            "linear": [*yarn_keys, *llama3_keys, "original_length"],
            "yarn": llama3_keys,
            "llama3": yarn_keys,
        }[self.type]
        if key := self.changed_key(*ignored_keys):
            raise ValueError(f"type is {self.type}, so {key} would be ignored")
        if self.original_length is None and self.type != "linear":
            raise ValueError(f"type is {self.type}, so original_length must be given")
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self


class ModelSpec(Section):
    """The model: a decoder, an encoder or a vision model, with its sizes and its options."""

    backbone: ArchitectureName = "llama"
    """Architecture of the layers. llama (second MH-MoE paper, arXiv 2411.16205): RMSNorm, rotary positions, SwiGLU, no
    biases. subln (first MH-MoE paper, arXiv 2404.15045): LayerNorm also inside attention and feed-forward layers, xPos,
    GELU, biases, embeddings scaled by sqrt(d_model). vit (ViT, arXiv 2010.11929, and AdaMV-MoE; for vision models):
    LayerNorm, GELU, biases."""
    encoder: EncoderSpec | None = None
    """Options that make the model an encoder of images and texts. An encoder has learned positions instead of xPos, and
    its embeddings are not scaled. It needs backbone subln. By default the model is a decoder."""
    vision: VisionSpec | None = None
    """Options that make the model a vision transformer, with learned positions. By default the model is a decoder."""
    vocab_size: OptionalTokenCount = 0
    """Number of rows of the token embedding; vision models have none. A tokenizer that `data prepare` trains has at
    most this many entries. The last row of an encoder is the mask token, so its tokenizer has one entry less."""
    d_model: Width
    layers: LayerCount
    attention_heads: HeadCount
    kv_heads: HeadCount | None = None
    """Number of heads of keys and values, each shared by the same number of attention heads (grouped queries). By
    default each attention head has its own."""
    d_head: Width | None = None
    """Width of an attention head; by default d_model / attention_heads."""
    attention_bias: AttentionBias | None = None
    """Projections of attention with a bias: none, qkv (queries, keys and values, as in Qwen2) or all (the output as
    well). By default none for llama; subln always has all, and the key must be left out."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMSNorm of queries and keys before the rotation of positions. head: over each head by itself (Qwen3). all: over
    all heads together (OLMoE)."""
    d_ff: Width | None = None
    """Hidden width of the dense feed-forward layers. It must be absent if every layer is a mixture of experts."""
    tied_embeddings: bool = True
    """If true, the output layer shares its weights with the embedding."""
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    """Scaling of rotary positions. By default positions are not scaled."""
    norm_eps: PositiveFloat = 1e-5
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training on the embedding and on the outputs of attention, dense layers and each expert (0.1 in
    the runs of the first MH-MoE paper)."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training on the attention weights (0.1 in the runs of the first MH-MoE paper)."""
    document_masks: bool = False
    """If true, a token attends only to tokens of its own document, in training and validation."""
    moe: MoESpec | None = None
    """Mixture-of-experts layers. By default every layer has a dense feed-forward layer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_head is None and self.vision is not None and self.d_model % self.attention_heads:
            raise ValueError(f"d_model {self.d_model} must be a multiple of attention_heads ({self.attention_heads})")
        if self.d_head is None and self.vision is None and self.d_model % (2 * self.attention_heads):
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of twice attention_heads ({self.attention_heads}), "
                "because rotary positions need an even width per head; or set d_head"
            )
        if self.d_head is not None and self.vision is None and self.d_head % 2:
            raise ValueError(f"d_head is {self.d_head}, but rotary positions need an even width per head")
        if self.encoder is not None and self.vision is not None:
            raise ValueError("model has both encoder and vision: remove one of them")
        if self.vision is None and not self.architecture.reads_tokens:
            raise ValueError(
                f"backbone {self.backbone} has no positions of tokens, so only vision models can have it: set "
                "model.vision, or another backbone"
            )
        if not self.vocab_size and self.vision is None:
            raise ValueError("vocab_size is missing: the number of rows of the embedding")
        self._check_trunk_options()
        if self.kv_heads is not None and not self.architecture.grouped_queries:
            backbones = " or ".join(
                name for name, architecture in ARCHITECTURES.items() if architecture.grouped_queries
            )
            raise ValueError(
                f"kv_heads: grouped queries are for the {backbones} backbone, and would be ignored on {self.backbone}"
            )
        if self.attention_heads % self.n_kv_heads:
            raise ValueError(f"attention_heads ({self.attention_heads}) must be a multiple of kv_heads")
        dense = self.dense_layers
        if dense and self.d_ff is None:
            raise ValueError(f"d_ff is missing: {dense} of the {self.layers} layers are dense feed-forward layers")
        if not dense and self.d_ff is not None:
            raise ValueError("every layer is a mixture of experts, so d_ff would be ignored")
        if self.moe:
            self._check_sub_tokens(self.moe)
            if not self.moe_layers:
                raise ValueError(
                    f"moe.every is {self.moe.every} and moe.dense_first {self.moe.dense_first}, so none of the "
                    f"{self.layers} layers has experts"
                )
            self._check_kernel(self.moe)
            self._check_smear(self.moe)
        if self.encoder:
            self._check_encoder(self.encoder)
        if self.vision:
            self._check_vision(self.vision)
        return self

    def _check_trunk_options(self) -> None:
        if self.architecture.has_trunk_options:
            return
        if name := self.changed_key("d_head", "attention_bias", "rope_scaling"):
            raise ValueError(f"{name} is fixed on the {self.backbone} backbone: remove it")
        if self.qk_norm != "none":
            raise ValueError(f"the {self.backbone} backbone has no norm of queries and keys: remove qk_norm")

    def _check_sub_tokens(self, moe: MoESpec) -> None:
        if moe.d_sub_token is None and self.d_model % moe.heads:
            raise ValueError(
                f"d_model {self.d_model} does not split into {moe.heads} equal sub-tokens; or set moe.d_sub_token"
            )
        has_projections = moe.has_head_projection and moe.has_merge_projection
        if self.joined_width != self.d_model and not has_projections:
            raise ValueError(
                f"moe.heads ({moe.heads}) times moe.d_sub_token ({moe.d_sub_token}) is not d_model ({self.d_model}), "
                "so head_projection and merge_projection must be true"
            )

    def _check_kernel(self, moe: MoESpec) -> None:
        limits, row_width = moe.kernel_limits, self.row_width
        if limits.functions is not None and self.architecture.expert_function not in limits.functions:
            backbones = " or ".join(
                n for n, architecture in ARCHITECTURES.items() if architecture.expert_function in limits.functions
            )
            raise ValueError(f"moe.kernel {moe.kernel} computes experts of backbone {backbones} only: set it to auto")
        if row_width % limits.size_multiple or moe.d_expert % limits.size_multiple:
            raise ValueError(
                f"moe.kernel {moe.kernel} takes widths that are multiples of {limits.size_multiple}, but rows are "
                f"{row_width} wide and experts {moe.d_expert}: set it to auto"
            )
        if limits.max_row_width is not None and row_width > limits.max_row_width:
            raise ValueError(
                f"moe.kernel {moe.kernel} takes rows up to {limits.max_row_width} wide, not {row_width}: set it to auto"
            )

    def _check_smear(self, moe: MoESpec) -> None:
        if moe.router != "smear":
            return
        if self.encoder is None:
            raise ValueError(
                "moe.router smear averages over whole samples, so that in a decoder later tokens would influence "
                "earlier ones: set moe.router to linear, or make the model an encoder"
            )
        if self.encoder.routers != "shared":
            raise ValueError(
                "moe.router smear has one expert for the image and the text of a pair: set encoder.routers to shared"
            )

    def _check_encoder(self, encoder: EncoderSpec) -> None:
        if self.backbone != "subln":
            raise ValueError(f"an encoder has the layers of backbone subln, not {self.backbone}: set backbone to subln")
        if self.document_masks:
            raise ValueError("document_masks is for decoders: a sample of an encoder has one text, so remove it")
        if self.changed_key("rope_theta"):
            raise ValueError("an encoder has tables of positions, so rope_theta would be ignored: remove it")
        if self.tied_embeddings:
            raise ValueError("the output of an encoder has weights of its own: set tied_embeddings to false")
        if self.vocab_size < 2:
            raise ValueError("vocab_size must be at least 2, because the last token of an encoder is the mask token")
        if self.moe is None:
            return
        for key in ("balance_over", "router"):
            if getattr(self.moe, key) in ("sequence", "domain"):
                raise ValueError(f"moe.{key} {getattr(self.moe, key)} is for decoders, which read samples of one kind")
        if self.moe.d_shared and encoder.experts == "beside":
            raise ValueError(
                "experts beside the feed-forward layers have shared layers already: set moe.d_shared to 0, or "
                "encoder.experts to replace"
            )

    def _check_vision(self, vision: VisionSpec) -> None:
        if key := self.changed_key("vocab_size", "document_masks", "rope_theta", "tied_embeddings"):
            raise ValueError(f"a vision model has no tokens, so {key} would be ignored: remove it")
        if self.rope_scaling is not None:
            raise ValueError("a vision model has tables of positions, so rope_scaling would be ignored: remove it")
        if self.moe is None:
            if vision.adaptive is not None:
                raise ValueError("vision.adaptive chooses the number of experts, but model.moe is missing: set it")
            return
        if self.moe.router in ("domain", "smear"):
            raise ValueError(f"moe.router {self.moe.router} is not for vision models: set it to linear or xmoe")
        if self.moe.balance_over != "micro_batch":
            raise ValueError(f"moe.balance_over {self.moe.balance_over} is for decoders: remove it")
        if vision.adaptive is not None:
            if not self.moe.top_k <= vision.adaptive.largest <= self.moe.experts:
                raise ValueError(
                    f"vision.adaptive.largest is {vision.adaptive.largest}, and must be between moe.top_k "
                    f"({self.moe.top_k}) and moe.experts ({self.moe.experts})"
                )
            if self.moe.second_expert == "random":
                raise ValueError("moe.second_expert random is for top_k 2, but vision.adaptive changes it: remove one")
            self._check_adaptive(self.moe, vision.adaptive)

    @staticmethod
    def _check_adaptive(moe: MoESpec, adaptive: AdaptiveSpec) -> None:
        if moe.groups > 1 and adaptive.largest > moe.top_groups * (moe.experts // moe.groups):
            raise ValueError(
                f"vision.adaptive.largest is {adaptive.largest}, but moe.top_groups ({moe.top_groups}) leaves a row "
                f"{moe.top_groups * (moe.experts // moe.groups)} experts: lower largest, or raise top_groups"
            )
        # With rule `coded`, all tasks share the memory of the last raise. A task may therefore lower its own number of
        # experts after the raise of another task, and then has one expert fewer than at the start.
        smallest = 2 if moe.normalize_gates else 1
        if adaptive.rule == "coded" and moe.top_k - 1 < smallest:
            raise ValueError(
                f"vision.adaptive.rule coded may lower a task to {moe.top_k - 1} experts, which must be at least "
                f"{smallest} here: raise moe.top_k, or set the rule to published"
            )

    @property
    def kind(self) -> ModelKind:
        """Kind of the model: the family whose section the spec has, and else a decoder."""
        return next((kind for kind in MODEL_FAMILIES if getattr(self, kind, None) is not None), "decoder")

    @property
    def family(self) -> ModelFamily:
        return MODEL_FAMILIES[self.kind]

    @property
    def has_classes(self) -> bool:
        """True if the outputs are classes with names, which the training data determines."""
        return self.vision is not None or (self.encoder is not None and self.encoder.answers is not None)

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.backbone]

    def with_moe(self, moe: MoESpec | None) -> "ModelSpec":
        """Return a model with other mixture-of-experts layers, or a dense model; it is checked like any spec.

        Dense layers get the default width if this model has none, and a dense model has no `vision.adaptive`.
        """
        has_dense_layers = moe is None or moe.every > 1 or moe.dense_first > 0 or self.has_experts_beside
        d_ff = (self.d_ff or default_d_ff(self.d_model)) if has_dense_layers else None
        tree = {**self.model_dump(exclude={"moe", "d_ff"}), "d_ff": d_ff, "moe": moe}
        if moe is None and self.vision is not None:
            tree["vision"] = {**tree["vision"], "adaptive": None}
        return ModelSpec.model_validate(tree)

    def at_largest_top_k(self) -> "ModelSpec":
        """Return the model with the largest `top_k` that the adaptive rule may give a task."""
        adaptive = None if self.vision is None else self.vision.adaptive
        if self.moe is None or adaptive is None:
            return self
        return self.model_copy(update={"moe": self.moe.model_copy(update={"top_k": adaptive.largest})})

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether layer `layer`, counted from 0, is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.dense_first and (layer + 1) % self.moe.every == 0

    @property
    def recomputed_share(self) -> float:
        """Share of the routes whose hidden rows in experts are recomputed in the backward pass."""
        moe = self.moe
        if moe is None:
            return 0.0
        if moe.router == "smear":
            return moe.recompute or 0.0
        if moe.kernel_limits.kept_rows != "as configured":
            return float(moe.kernel_limits.kept_rows == "nothing")
        if moe.recompute is not None:
            return moe.recompute
        # If experts recompute the share 0.6 of their hidden rows, a layer with 4 heads needs about 1.2 times the memory
        # of a layer with one head and the same work (kernels/README.md).
        return 0.6 if moe.d_expert >= 8 * self.row_width else 0.0

    @property
    def row_width(self) -> int:
        """Width D of the rows that the router and the experts compute on; the model must have experts."""
        assert self.moe is not None
        return self.moe.d_sub_token or self.d_model // self.moe.heads

    @property
    def joined_width(self) -> int:
        """Width h * D of a token's h sub-tokens together; the model must have experts."""
        assert self.moe is not None
        return self.moe.heads * self.row_width

    @property
    def projection_widths(self) -> list[int]:
        """Widths before, between and after the layers of the head projection; reversed, of the merge projection."""
        assert self.moe is not None
        # Between the linear layers is a ReLU. A token of d values passes it unchanged only if its positive and its
        # negative parts are separate values, 2 d in all. The inner width is therefore h * D and not d: if it is at
        # least 2 d, several layers can be the identity.
        return [self.d_model, *[self.joined_width] * self.moe.projection_layers]

    @property
    def moe_layers(self) -> int:
        return sum(map(self.is_moe_layer, range(self.layers)))

    @property
    def has_experts_beside(self) -> bool:
        """True if layers with experts also have dense feed-forward layers, whose outputs are added."""
        return self.encoder is not None and self.encoder.experts == "beside"

    @property
    def dense_layers(self) -> int:
        return self.layers if self.has_experts_beside else self.layers - self.moe_layers

    @property
    def text_vocab_size(self) -> int:
        """Largest number of entries of a tokenizer: all rows but an encoder's mask token."""
        return self.vocab_size - (self.encoder is not None)

    @property
    def is_random(self) -> bool:
        """True if a training step draws random numbers."""
        return self.dropout > 0 or self.attention_dropout > 0 or (self.moe is not None and self.moe.is_random)

    @property
    def n_kv_heads(self) -> int:
        return self.kv_heads or self.attention_heads

    @property
    def head_width(self) -> int:
        return self.d_head or self.d_model // self.attention_heads

    @property
    def query_width(self) -> int:
        return self.attention_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of the keys of all heads together, and of the values."""
        return self.n_kv_heads * self.head_width

    @property
    def biased_attention(self) -> AttentionBias:
        return self.attention_bias or self.architecture.attention_bias
