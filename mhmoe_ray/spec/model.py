"""The `model` section: a decoder with (multi-head) mixture-of-experts layers, its routers and its kernels.

Sizes use the papers' names: d (`d_model`), h (`moe.heads`), E (`moe.experts`), k (`moe.top_k`), f (`moe.d_expert`). P1
is the first MH-MoE paper (arXiv 2404.15045), P2 the follow-up (arXiv 2411.16205). Where they or their code disagree,
both readings are options, and the default is P2's.

`ROUTERS` has the sizes of each router, for E experts and rows of D values, which some routers first project to Q
values; `model/router.py` computes the logits themselves. `architectures/` says what an architecture allows, and
`mhmoe_kernels.abilities` what a kernel can compute.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mhmoe_kernels.abilities import KERNELS, Abilities, KernelName
from mhmoe_ray.architectures import ARCHITECTURES, Architecture, ArchitectureName
from mhmoe_ray.spec.base import Section

RouterName = Literal["linear", "xmoe", "xmoe_torchscale"]


class RouterSizes(NamedTuple):
    macs: int
    """Multiply-adds per row."""
    parameters: int
    kept: int
    """Number of values that the backward needs per row, besides logits and probabilities."""


def _linear(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=D * E, parameters=D * E, kept=0)


def _xmoe(E: int, D: int, Q: int) -> RouterSizes:
    """Return the sizes of X-MoE's router, which keeps cosines, and probabilities once more at the temperature of the
    load-balancing loss."""
    return RouterSizes(macs=Q * (D + E), parameters=Q * (D + E) + 1, kept=2 * E + 4 * (Q + 1))


def _torchscale(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=Q * (D + E), parameters=Q * (D + E), kept=Q)


ROUTERS: dict[RouterName, Callable[[int, int, int], RouterSizes]] = {
    "linear": _linear,
    "xmoe": _xmoe,
    "xmoe_torchscale": _torchscale,
}


class MoESpec(Section):
    """A mixture-of-experts layer; `heads: 1` is the plain sparse mixture of experts (SMoE)."""

    heads: PositiveInt = 2
    """h: number of sub-tokens per token."""
    experts: PositiveInt = 8
    """E: number of routed experts in each layer."""
    top_k: PositiveInt = 2
    """k: number of experts that each sub-token is routed to."""
    d_expert: PositiveInt
    """f: hidden width of one expert."""
    every: PositiveInt = 2
    """Spacing of mixture-of-experts layers: layer i (from 0) is one if (i + 1) is a multiple of this."""

    head_projection: bool | None = None
    """Whether there is a linear layer before the split into sub-tokens; by default only if h > 1."""
    merge_projection: bool | None = None
    """Whether there is a linear layer after the join of sub-tokens; by default only if h > 1."""
    projection_layers: int = Field(default=1, ge=1, le=3)
    """Number of linear layers in each of the two projections, with ReLU between them (P1's ablation n)."""
    sub_token_residual: bool = False
    """Whether to add each sub-token to its experts' output before the merge projection (P1's equation 6; none of the
    authors' code does)."""
    d_shared: NonNegativeInt = 0
    """Hidden width of a shared expert, which sees every whole token in addition to the routed experts; 0: no shared
    expert."""

    router: RouterName = "linear"
    """Router. linear: softmax of W x (P2). xmoe: cosine of a projection with expert embeddings, divided by a learnable
    temperature, as published. xmoe_torchscale: X-MoE's router as coded and used for P1, with 16 dimensions, only the
    expert side normalized, and no temperature."""
    router_dim: int | None = Field(default=None, ge=2)
    """Width of xmoe's projection; by default E / 2, as its authors advise. It is at least 2: in one dimension a cosine
    is 1 or -1, and the router learns nothing."""
    normalize_gates: bool = False
    """Whether to divide the k gates (routing weights) by their sum (P1, Mixtral) instead of using raw softmax weights
    (P2's code)."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Router jitter: in training, the router's input is multiplied by factors drawn uniformly from 1 - jitter to 1 +
    jitter."""
    capacity_factor: PositiveFloat | None = None
    """Capacity factor of static routing: in training and validation an expert takes at most this times k * ceil(N / E)
    of the N rows of a micro-batch, first choices first, and drops the others. By default routing is dropless. Serving
    is always dropless, as was the first paper's evaluation on tasks: otherwise the rows of one request would displace
    those of another."""
    second_expert: Literal["always", "random"] = "always"
    """Use of the second choice. always: keep it. random: in training, keep a second choice of weight g with probability
    min(1, 2 g), as P1 ran it."""

    balance_weight: float = Field(default=0.01, ge=0)
    """Factor of the load-balancing loss, which is summed over layers; a uniform router costs exactly this much per
    layer."""
    balance_choices: Literal["first", "all"] = "first"
    """Choices that the load-balancing loss counts: the first of each row (both papers' code), or all k."""
    z_weight: float = Field(default=0.0, ge=0)
    """Factor of the router z-loss, the mean squared log-sum-exp of the router's logits, which is summed over layers."""
    bias_rate: float = Field(default=0.0, ge=0)
    """Rate of load balancing without a loss: after each step, the selection bias of each expert, which affects only the
    choice of experts, rises by this much if the expert got less than its share and falls by it if it got more."""

    kernel: KernelName = "auto"
    """Kernel that runs routed rows through the experts (kernels/README.md). auto: the fastest that can run on the
    hardware. cpp: compiled for the CPU on which it runs. capacity: the papers' static layout with its N x E x C masks,
    for comparison."""
    recompute: float | None = Field(default=None, ge=0, le=1)
    """Share of the routes whose hidden rows are recomputed in the backward instead of kept. By default 0.6 if an expert
    is at least 8 times as wide as a row, which keeps the memory of a layer with 4 heads near that of a plain one with
    the same work (kernels/README.md), and otherwise 0. It applies to kernel grouped, and to auto where that selects
    grouped; of the others, cpp and triton keep no hidden rows and the rest keep all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts")
        if self.router_dim is not None and self.router != "xmoe":
            raise ValueError(f"router {self.router} has no width to choose, so router_dim would be ignored")
        if self.second_expert == "random" and self.top_k != 2:
            raise ValueError(f"second_expert: random is for top_k 2, so it would be ignored at top_k {self.top_k}")
        if self.balance_choices == "all" and not self.balance_weight:
            raise ValueError("balance_weight is 0, so balance_choices would be ignored")
        if self.projection_layers > 1 and not (self.has_head or self.has_merge):
            raise ValueError("there is neither head nor merge projection, so projection_layers would be ignored")
        if self.recompute is not None and self.kernel_limits.keeps != "as told":
            raise ValueError(f"kernel {self.kernel} does not keep or recompute as told, so recompute would be ignored")
        if self.kernel == "capacity" and self.capacity_factor is None:
            raise ValueError("kernel capacity lays out a limited number of places: give capacity_factor")
        if self.normalize_gates and self.top_k == 1:
            raise ValueError("normalize_gates makes the only weight of top_k 1 always 1, and the router learns nothing")
        if self.balance_choices == "all" and self.top_k == 1:
            raise ValueError("top_k is 1, so balance_choices: all would be ignored: there is only a first choice")
        return self

    @property
    def has_head(self) -> bool:
        return self.heads > 1 if self.head_projection is None else self.head_projection

    @property
    def has_merge(self) -> bool:
        return self.heads > 1 if self.merge_projection is None else self.merge_projection

    @property
    def kernel_limits(self) -> Abilities:
        """Limits of the layer's kernel."""
        return KERNELS[self.kernel]

    def places(self, rows: int) -> int | None:
        """Return the expert capacity for N rows: factor * k * ceil(N / E), rounded up; None if routing is dropless.

        At factor 1 this is 2 * ceil(N / E) of P1's top-2 gate, and k * ceil(N / E) of P2's code.
        """
        if self.capacity_factor is None:
            return None
        exactly = Fraction(str(self.capacity_factor)) * self.top_k * -(-rows // self.experts)
        return math.ceil(exactly)  # in binary, 1.1 * 10 is above 11

    @property
    def is_random(self) -> bool:
        """Whether routing draws random numbers in training."""
        return self.jitter > 0 or self.second_expert == "random"

    @property
    def routing_width(self) -> int:
        """Width of X-MoE's projection."""
        return 16 if self.router == "xmoe_torchscale" else self.router_dim or max(2, self.experts // 2)

    def router_sizes(self, width: int) -> RouterSizes:
        """Return the sizes of the router on rows of a width."""
        return ROUTERS[self.router](self.experts, width, self.routing_width)


def usual_width(d_model: int) -> int:
    """Return the usual width of a dense feed-forward layer: 8/3 d, as in LLaMA, rounded up to a multiple of 128."""
    return math.ceil(d_model * 8 / 3 / 128) * 128


class ModelSpec(Section):
    backbone: ArchitectureName = "llama"
    """Architecture of the decoder. llama (P2): RMSNorm, rotary positions, SwiGLU, no biases. subln (P1): LayerNorm also
    inside attention and feed-forward, xPos, GELU, biases, embeddings scaled by sqrt(d)."""
    vocab_size: PositiveInt
    """Number of rows of the embedding; a tokenizer trained by `data prepare` gets at most this many entries."""
    d_model: PositiveInt
    layers: PositiveInt
    attention_heads: PositiveInt
    kv_heads: PositiveInt | None = None
    """Number of heads of keys and values, each shared by the same number of attention heads; by default each attention
    head has its own."""
    d_ff: PositiveInt | None = None
    """Hidden width of the dense feed-forward layers; left out if every layer is a mixture of experts."""
    tied_embeddings: bool = True
    """Whether the output layer shares its weights with the embedding."""
    rope_theta: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-5
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training, on the embedding and the outputs of attention, dense layers and each expert (P1 ran
    0.1)."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training on the attention weights (P1 ran 0.1)."""
    document_masks: bool = False
    """Whether, in training and validation, a token attends only to its own document and not to others in the same
    sample."""
    moe: MoESpec | None = None
    """Mixture-of-experts layers; by default every layer is dense."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % (2 * self.attention_heads):
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of twice attention_heads ({self.attention_heads}), "
                "because rotary positions need an even width per head"
            )
        if self.kv_heads is not None and not self.architecture.grouped_queries:
            others = " or ".join(name for name, other in ARCHITECTURES.items() if other.grouped_queries)
            raise ValueError(
                f"kv_heads: grouped queries are for the {others} backbone, and would be ignored on {self.backbone}"
            )
        if self.attention_heads % self.n_kv_heads:
            raise ValueError(f"attention_heads ({self.attention_heads}) must be a multiple of kv_heads")
        dense = self.layers - self.moe_layers
        if dense and self.d_ff is None:
            raise ValueError(f"d_ff is missing: {dense} of the {self.layers} layers are dense feed-forward layers")
        if not dense and self.d_ff is not None:
            raise ValueError("every layer is a mixture of experts, so d_ff would be ignored")
        if self.moe and self.d_model % self.moe.heads:
            raise ValueError(f"d_model {self.d_model} does not split into {self.moe.heads} equal sub-tokens")
        if self.moe and not self.moe_layers:
            raise ValueError(f"moe.every is {self.moe.every}, so none of the {self.layers} layers has experts")
        if self.moe:
            self._check_kernel(self.moe)
        return self

    def _check_kernel(self, moe: MoESpec) -> None:
        limits, row = moe.kernel_limits, self.d_model // moe.heads
        if limits.function not in (None, self.architecture.expert_function):
            others = " or ".join(n for n, other in ARCHITECTURES.items() if other.expert_function == limits.function)
            raise ValueError(f"moe.kernel {moe.kernel} computes experts of backbone {others} only: set it to auto")
        if row % limits.sizes or moe.d_expert % limits.sizes:
            raise ValueError(
                f"moe.kernel {moe.kernel} takes even sizes only, but rows are {row} wide and experts {moe.d_expert}: "
                "set it to auto"
            )
        if limits.widest_row is not None and row > limits.widest_row:
            raise ValueError(
                f"moe.kernel {moe.kernel} takes rows up to {limits.widest_row} wide, not {row}: set it to grouped"
            )

    @property
    def architecture(self) -> Architecture:
        """Choices and counts of the backbone's architecture."""
        return ARCHITECTURES[self.backbone]

    def with_moe(self, moe: MoESpec | None) -> "ModelSpec":
        """Return the same trunk with other expert layers, checked; with None, the dense model.

        Dense layers get the usual width if the trunk had none.
        """
        d_ff = None if moe is not None and moe.every == 1 else self.d_ff or usual_width(self.d_model)
        return ModelSpec.model_validate({**self.model_dump(exclude={"moe", "d_ff"}), "d_ff": d_ff, "moe": moe})

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (counted from 0) is a mixture of experts."""
        return self.moe is not None and (layer + 1) % self.moe.every == 0

    @property
    def recomputes(self) -> float:
        """Share of the routes whose hidden rows experts do not keep for the backward."""
        moe = self.moe
        if moe is None:
            return 0.0
        if moe.kernel_limits.keeps != "as told":
            return float(moe.kernel_limits.keeps == "nothing")
        if moe.recompute is not None:
            return moe.recompute
        return 0.6 if moe.d_expert >= 8 * self.d_model // moe.heads else 0.0

    @property
    def moe_layers(self) -> int:
        return sum(self.is_moe_layer(i) for i in range(self.layers))

    @property
    def is_random(self) -> bool:
        """Whether a training step draws random numbers."""
        return self.dropout > 0 or self.attention_dropout > 0 or (self.moe is not None and self.moe.is_random)

    @property
    def n_kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.kv_heads or self.attention_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.attention_heads
