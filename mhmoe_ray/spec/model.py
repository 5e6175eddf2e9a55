"""The `model` section: a decoder, an encoder or a vision model with (multi-head) mixture-of-experts layers, its routers
and its kernels.

Sizes use the papers' names: d (`d_model`), h (`moe.heads`), E (`moe.experts`), k (`moe.top_k`), f (`moe.d_expert`). D
(`moe.d_sub_token`) is the width of a sub-token, which is d / h in the papers. P1 is the first MH-MoE paper (arXiv
2404.15045), P2 the follow-up (arXiv 2411.16205). Where the papers or their code disagree, both readings are options,
and the default is P2's.

`architectures/` has the options of each architecture, and `mhmoe_kernels.abilities` the limits of each kernel.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mhmoe_kernels.abilities import KERNELS, KernelLimits, KernelName
from mhmoe_ray.architectures import ARCHITECTURES, Architecture, ArchitectureName
from mhmoe_ray.spec.base import Section, unmeasured
from mhmoe_ray.spec.encoder import EncoderSpec
from mhmoe_ray.spec.vision import VisionSpec

RouterName = Literal["linear", "xmoe", "xmoe_torchscale", "domain", "smear"]
AttentionBias = Literal["none", "qkv", "all"]
ModelKind = Literal["decoder", "encoder", "vision"]


class RouterSizes(NamedTuple):
    """Counts of the router of one layer."""

    macs: int
    """Multiply-adds per row."""
    parameters: int
    saved_values: int
    """Number of values per row that the forward saves for the backward, besides logits and probabilities."""


def _linear_sizes(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=D * E, parameters=D * E, saved_values=0)


def _xmoe_sizes(E: int, D: int, Q: int) -> RouterSizes:
    """Return the counts of X-MoE's router for E experts, rows of D values, and a projection to Q values."""
    # It saves cosines, and a second set of probabilities at the temperature of the load balancing loss.
    return RouterSizes(macs=Q * (D + E), parameters=Q * (D + E) + 1, saved_values=2 * E + 4 * (Q + 1))


def _domain_sizes(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=0, parameters=0, saved_values=0)


def _smear_sizes(E: int, D: int, Q: int) -> RouterSizes:
    """Return the counts of router smear for E experts and rows of D values."""
    # It computes logits once for each sample. `planner/sizes.py` counts that cost with the merging of experts. Besides
    # the matrix, its parameters are the weight and bias of a norm, and the gain of another.
    return RouterSizes(macs=0, parameters=D * E + 3 * D, saved_values=0)


def _torchscale_sizes(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=Q * (D + E), parameters=Q * (D + E), saved_values=Q)


# The sizes of each router for E experts and rows of D values, which X-MoE's routers first project to Q values.
# `model/router.py` computes the logits.
ROUTERS: dict[RouterName, Callable[[int, int, int], RouterSizes]] = {
    "linear": _linear_sizes,
    "xmoe": _xmoe_sizes,
    "xmoe_torchscale": _torchscale_sizes,
    "domain": _domain_sizes,
    "smear": _smear_sizes,
}


class MoESpec(Section):
    """A mixture-of-experts layer. `heads: 1` is the plain sparse mixture of experts (SMoE)."""

    heads: PositiveInt = 2
    """h: number of sub-tokens per token."""
    d_sub_token: PositiveInt | None = None
    """D: width of a sub-token; by default d_model / heads. The router and the experts compute on rows of this width.
    With another width than the default, the first layer of the head projection leads from d_model to heads *
    d_sub_token values, and the last layer of the merge projection leads back. Layers between them have heads *
    d_sub_token values."""
    experts: PositiveInt = 8
    """E: number of routed experts in each layer."""
    top_k: PositiveInt = 2
    """k: number of experts that each sub-token is routed to."""
    d_expert: PositiveInt
    """f: hidden width of one expert."""
    every: PositiveInt = 2
    """Spacing of mixture-of-experts layers: layer i (from 0) is one if i + 1 is a multiple of this number."""
    dense_first: NonNegativeInt = 0
    """Number of layers at the start of the model that are dense, whatever `every` says (DeepSeek-V3)."""

    head_projection: bool | None = None
    """If true, there is a linear layer before the split into sub-tokens; by default only if h > 1."""
    merge_projection: bool | None = None
    """If true, there is a linear layer after the join of sub-tokens; by default only if h > 1."""
    projection_layers: int = Field(default=1, ge=1, le=3)
    """Number of linear layers in each of the two projections, with ReLU between them (P1's ablation n)."""
    sub_token_residual: bool = False
    """If true, each sub-token is added to its experts' output before the merge projection. P1's equation 6 does so, but
    none of the authors' code."""
    d_shared: NonNegativeInt = 0
    """Hidden width of a shared expert, which computes on every whole token in addition to the routed experts. 0: no
    shared expert."""

    router: RouterName = "linear"
    """Router. linear: softmax of W x (P2). xmoe: X-MoE's router as published, the cosine of a projection with expert
    embeddings, divided by a learnable temperature. xmoe_torchscale: X-MoE's router as coded and used for P1, with 16
    dimensions, only the expert side normalized, and no temperature. domain: no router; each document goes to the expert
    of its domain (DEMix, arXiv 2108.05036). smear: for encoders; the weights of all experts are averaged into one
    expert for each sample (SMEAR, arXiv 2306.03745)."""
    domains: list[str] | None = Field(default=None, min_length=1)
    """Names of the experts of router `domain`, in their order: sources (`web`) or domains (`web/en`) of the data. A
    document belongs to the expert with the name of its domain, and otherwise to the one with the name of its source."""
    router_dim: int | None = Field(default=None, ge=2)
    """Width of xmoe's projection; by default E / 2, as its authors advise. It must be at least 2: in one dimension a
    cosine is 1 or -1, and the router learns nothing."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Function from the router's logits to scores. softmax: over all experts. sigmoid: of each logit by itself
    (DeepSeek-V3)."""
    normalize_gates: bool = False
    """If true, the k gates (routing weights) are divided by their sum (P1, Mixtral). By default they are the raw
    scores (P2's code)."""
    gate_scale: PositiveFloat = 1.0
    """Factor of all gates (DeepSeek-V3's route scale)."""
    groups: PositiveInt = 1
    """Number of equal groups of experts for group-limited routing. Only the experts of the best `top_groups` groups of
    a row are considered. The value of a group is the sum of its two largest scores (DeepSeek-V3)."""
    top_groups: PositiveInt = 1
    """Number of groups whose experts are considered for a row."""
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability in training that router smear leaves an expert out of a sample's average (0.1 in the runs of SMEAR's
    authors)."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Router jitter: in training, the router's input is multiplied by factors drawn uniformly from 1 - jitter to 1 +
    jitter."""
    noise: float = Field(default=0.0, ge=0)
    """Noise of the router: in training, its logits get normal noise with a standard deviation of this number divided by
    E (V-MoE and AdaMV-MoE: 1)."""
    capacity_factor: PositiveFloat | None = None
    """Capacity factor of static routing, which limits the rows of an expert in training and validation. The expert
    capacity is this factor times k * ceil(N / E) for the N rows of a micro-batch. Rows beyond it are dropped; first
    choices have precedence over second choices. By default routing is dropless. Serving is always dropless, so that the
    rows of one request cannot displace those of another."""
    second_expert: Literal["always", "random"] = "always"
    """Use of the second choice. always: keep it. random: in training, keep a second choice of weight g with probability
    min(1, 2 g), as P1's runs did."""

    balance_weight: float = Field(default=0.01, ge=0)
    """Factor of the load balancing loss, which is summed over layers. A uniform router costs exactly this much per
    layer."""
    balance: Literal["shares", "importance_load"] = "shares"
    """Load balancing loss. shares: each expert's mean probability times its share of the choices (both papers' code).
    importance_load: the squared coefficients of variation of the experts' importance and of their load (V-MoE), for
    which the router must have noise."""
    balance_choices: Literal["first", "all"] = "first"
    """Choices that the load balancing loss counts: the first choice of each row (both papers' code), or all k."""
    balance_over: Literal["micro_batch", "sequence", "step"] = "micro_batch"
    """Rows over which the load balancing loss counts choices. micro_batch: the rows of a micro-batch (both papers'
    code). sequence: those of each sequence by itself (DeepSeek-V3). step: those of all micro-batches of all ranks
    (global batch, arXiv 2501.11873). The counts of a step are complete only at its end, so a step uses the counts of
    the step before it; the first step has no load balancing loss."""
    z_weight: float = Field(default=0.0, ge=0)
    """Factor of the router z-loss, which is the mean squared log-sum-exp of the router's logits, summed over layers."""
    bias_rate: float = Field(default=0.0, ge=0)
    """Rate of load balancing without a loss. After each step, the selection bias of an expert rises by this rate if the
    expert had fewer rows than the mean, and falls by it if the expert had more. The bias affects only the choice of
    experts."""

    kernel: Annotated[KernelName, unmeasured("sonicmoe", "deepgemm", "fp8", "cuda_graphs")] = "auto"
    """Kernel that runs routed rows through the experts (kernels/README.md). auto: the fastest kernel that the hardware
    can run. cpp: compiled for the CPU on which it runs. capacity: the papers' static layout with its N x E x C masks,
    for comparison."""
    recompute: float | None = Field(default=None, ge=0, le=1)
    """Share of the routes whose hidden rows are recomputed in the backward instead of kept. By default it is 0.6 if an
    expert is at least 8 times as wide as a row, and otherwise 0. It applies to kernels grouped, grouped_gemm and
    grouped_mm, and to auto where that selects one of them. Of the other kernels, cpp and triton keep no hidden rows,
    and the rest keep all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts")
        if self.router_dim is not None and self.router != "xmoe":
            raise ValueError(f"router {self.router} has a fixed width, so router_dim would be ignored")
        if self.second_expert == "random" and self.top_k != 2:
            raise ValueError(f"second_expert: random is for top_k 2, so it would be ignored at top_k {self.top_k}")
        if self.balance_choices == "all" and not self.balance_weight:
            raise ValueError("balance_weight is 0, so balance_choices would be ignored")
        self._check_balance_over()
        if self.balance == "importance_load" and not self.noise:
            raise ValueError("balance: importance_load measures load by the router's noise: set noise")
        if self.balance == "importance_load" and (self.balance_over != "micro_batch" or self.balance_choices == "all"):
            raise ValueError(
                "balance: importance_load is over the rows of a micro-batch: remove the other balance keys"
            )
        if self.projection_layers > 1 and not (self.has_head_projection or self.has_merge_projection):
            raise ValueError("there is neither head nor merge projection, so projection_layers would be ignored")
        if self.recompute is not None and self.kernel_limits.kept_rows != "as configured":
            raise ValueError(f"kernel {self.kernel} cannot recompute a share of routes, so recompute would be ignored")
        if self.kernel == "capacity" and self.capacity_factor is None:
            raise ValueError("kernel capacity needs a limited expert capacity: set capacity_factor")
        if self.normalize_gates and self.top_k == 1:
            raise ValueError("with top_k 1, normalize_gates makes every gate 1, and the router learns nothing")
        if self.balance_choices == "all" and self.top_k == 1:
            raise ValueError("top_k is 1, so balance_choices: all would be ignored: there is only a first choice")
        self._check_domains()
        self._check_smear()
        if self.scoring == "sigmoid" and self.router != "linear":
            raise ValueError(f"router {self.router} is defined with softmax: remove scoring, or use router linear")
        self._check_groups()
        return self

    def _check_balance_over(self) -> None:
        if self.balance_over != "micro_batch" and not self.balance_weight:
            raise ValueError("balance_weight is 0, so balance_over would be ignored")
        if self.balance_over != "step":
            return
        if self.balance_choices == "first" and self.top_k > 1:
            raise ValueError("balance_over: step counts all choices: set balance_choices to all")
        if self.capacity_factor is not None or self.second_expert == "random":
            raise ValueError("balance_over: step counts the routes that are kept, so no route may be dropped")

    def _check_domains(self) -> None:
        if self.router != "domain":
            if self.domains is not None:
                raise ValueError(f"domains are for router domain, and would be ignored with router {self.router}")
            return
        if self.domains is None:
            raise ValueError("router domain needs domains, the names of its experts")
        if len(set(self.domains)) < len(self.domains):
            raise ValueError("domains has a name twice")
        if self.experts != len(self.domains):
            raise ValueError(f"experts is {self.experts}, but domains names {len(self.domains)}: set it to that")
        if self.top_k != 1:
            raise ValueError("router domain sends a document to one expert: set top_k to 1")
        # The load balancing loss has a default weight, so a weight is no mistake; it has no effect.
        for key in ("gate_scale", "jitter", "noise", "capacity_factor", "balance_over", "z_weight", "bias_rate"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"router domain computes no scores, so {key} would be ignored: remove it")

    def _check_smear(self) -> None:
        if self.router != "smear":
            if self.expert_dropout:
                raise ValueError(f"expert_dropout is for router smear, and would be ignored with router {self.router}")
            return
        if self.heads != 1:
            raise ValueError("router smear averages experts for whole samples, and splits no tokens: set heads to 1")
        if self.top_k != 1:
            raise ValueError("router smear averages all experts into one and makes no choice: set top_k to 1")
        # The load balancing loss has a default weight, so a weight is no mistake; it has no effect.
        refused_keys = (
            *("d_sub_token", "sub_token_residual", "gate_scale", "groups", "jitter", "noise"),
            *("capacity_factor", "balance_over", "z_weight", "bias_rate", "kernel", "recompute"),
        )
        for key in refused_keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"router smear sends no rows to experts, so {key} would be ignored: remove it")
        for key in ("head_projection", "merge_projection"):
            if getattr(self, key):
                raise ValueError(f"router smear has no projections: remove {key}")

    def expert_of_domain(self, domain: str) -> int | None:
        """Return the number of the expert of router `domain` for a domain of the data; None if it has none."""
        assert self.domains is not None
        for name in (domain, domain.partition("/")[0]):
            if name in self.domains:
                return self.domains.index(name)
        return None

    def _check_groups(self) -> None:
        if self.groups == 1 and self.top_groups > 1:
            raise ValueError("groups is 1, so top_groups would be ignored")
        if self.experts % self.groups:
            raise ValueError(f"experts ({self.experts}) do not split into {self.groups} equal groups")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups is {self.top_groups}, but there are only {self.groups} groups")
        if self.top_groups * (self.experts // self.groups) < self.top_k:
            raise ValueError(f"{self.top_groups} of {self.groups} groups have fewer than top_k ({self.top_k}) experts")

    @property
    def has_head_projection(self) -> bool:
        return self.heads > 1 if self.head_projection is None else self.head_projection

    @property
    def has_merge_projection(self) -> bool:
        return self.heads > 1 if self.merge_projection is None else self.merge_projection

    @property
    def kernel_limits(self) -> KernelLimits:
        """The limits of the layer's kernel."""
        return KERNELS[self.kernel]

    def expert_capacity(self, rows: int, top_k: int | None = None) -> int | None:
        """Return the expert capacity for N rows: capacity_factor * k * ceil(N / E), rounded up; None if routing is
        dropless.

        Args:
            rows: N.
            top_k: k, by default that of the spec.
        """
        # With factor 1 this is the capacity of both papers' code: 2 * ceil(N / E) for P1's top-2 routing, and
        # k * ceil(N / E) in P2.
        if self.capacity_factor is None:
            return None
        # The factor with nine decimal places as an integer, because as binary numbers 1.1 * 10 is above 11.
        factor_digits = max(1, round(self.capacity_factor * 10**9))
        return -(-factor_digits * (top_k or self.top_k) * -(-rows // self.experts) // 10**9)

    @property
    def is_random(self) -> bool:
        """True if routing draws random numbers in training."""
        return self.jitter > 0 or self.noise > 0 or self.second_expert == "random" or self.expert_dropout > 0

    @property
    def routing_width(self) -> int:
        """The width Q of the projection in X-MoE's routers. Router `linear` has none and ignores it."""
        # P1's code has no other width than 16.
        return 16 if self.router == "xmoe_torchscale" else self.router_dim or max(2, self.experts // 2)

    def router_sizes(self, width: int) -> RouterSizes:
        """Return the counts of the router for rows of width `width`."""
        return ROUTERS[self.router](self.experts, width, self.routing_width)


def default_d_ff(d_model: int) -> int:
    """Return the default hidden width of a dense feed-forward layer: 8/3 of `d_model`, rounded up to a multiple of
    128."""
    # 8/3 is LLaMA's factor.
    return math.ceil(d_model * 8 / 3 / 128) * 128


class RopeScaling(Section):
    """Scaling of rotary positions, with which a model reads longer texts than those of its first training."""

    type: Literal["linear", "yarn", "llama3"]
    """linear: positions are divided by the factor. yarn: only low frequencies are, and attention is sharpened (arXiv
    2309.00071). llama3: only low frequencies are, as in Llama 3.1."""
    factor: float = Field(ge=1)
    """Ratio of the new context length to the original one."""
    original_length: PositiveInt | None = None
    """Context length of the first training; required for yarn and llama3."""
    beta_fast: PositiveFloat = 32.0
    """yarn: frequencies with more than this many turns in the original length are not scaled."""
    beta_slow: PositiveFloat = 1.0
    """yarn: frequencies with fewer than this many turns in the original length are scaled fully."""
    attention_factor: PositiveFloat | None = None
    """yarn: factor of rotated queries and keys; by default 0.1 ln(factor) + 1."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: frequencies with fewer than this many turns in the original length are scaled fully."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: frequencies with more than this many turns in the original length are not scaled."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        yarn_keys, llama3_keys = {"beta_fast", "beta_slow", "attention_factor"}, {"low_freq_factor", "high_freq_factor"}
        ignored_keys = {
            "linear": {"original_length"} | yarn_keys | llama3_keys,
            "yarn": llama3_keys,
            "llama3": yarn_keys,
        }[self.type]
        # A spec that was written from another one names every key, so only values other than the defaults count.
        for key in sorted(ignored_keys):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"type is {self.type}, so {key} would be ignored")
        if self.original_length is None and self.type != "linear":
            raise ValueError(f"type is {self.type}, so original_length must be given")
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self


class ModelSpec(Section):
    """The model: a decoder or an encoder, its sizes and its options."""

    backbone: ArchitectureName = "llama"
    """Architecture of the layers. llama (P2): RMSNorm, rotary positions, SwiGLU, no biases. subln (P1): LayerNorm also
    inside attention and feed-forward, xPos, GELU, biases, embeddings scaled by sqrt(d)."""
    encoder: EncoderSpec | None = None
    """Makes the model an encoder of images and texts, with learned positions and without xPos and the scaling of
    embeddings. It needs backbone subln. By default the model is a decoder."""
    vision: VisionSpec | None = None
    """Makes the model a vision transformer, with learned positions. By default the model is a decoder."""
    vocab_size: NonNegativeInt = 0
    """Number of rows of the embedding; vision models have none. A tokenizer that `data prepare` trains has at most this
    many entries. The last row of an encoder is the mask token, and its tokenizer has one entry less."""
    d_model: PositiveInt
    layers: PositiveInt
    attention_heads: PositiveInt
    kv_heads: PositiveInt | None = None
    """Number of heads of keys and values, each shared by the same number of attention heads (grouped queries). By
    default each attention head has its own."""
    d_head: PositiveInt | None = None
    """Width of an attention head; by default d_model / attention_heads."""
    attention_bias: AttentionBias | None = None
    """Projections of attention that have a bias: none, qkv (queries, keys and values, as in Qwen2) or all (also the
    output). The default is that of the backbone: none for llama. subln has all, and no other choice."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMSNorm of queries and keys before rotation. head: of each head by itself (Qwen3). all: of all heads together
    (OLMoE)."""
    d_ff: PositiveInt | None = None
    """Hidden width of the dense feed-forward layers. It must be absent if every layer is a mixture of experts."""
    tied_embeddings: bool = True
    """If true, the output layer shares its weights with the embedding."""
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    """Scaling of rotary positions. By default positions are not scaled."""
    norm_eps: PositiveFloat = 1e-5
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training on the embedding and on the outputs of attention, dense layers and each expert (0.1 in
    P1's runs)."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training on the attention weights (0.1 in P1's runs)."""
    document_masks: bool = False
    """If true, a token attends only to its own document in training and validation, and not to other documents of the
    same sample."""
    moe: MoESpec | None = None
    """Mixture-of-experts layers. By default every layer is dense."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_head is None and self.d_model % (2 * self.attention_heads):
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of twice attention_heads ({self.attention_heads}), "
                "because rotary positions need an even width per head; or set d_head"
            )
        if self.d_head is not None and self.d_head % 2:
            raise ValueError(f"d_head is {self.d_head}, but rotary positions need an even width per head")
        if self.encoder is not None and self.vision is not None:
            raise ValueError("model has both encoder and vision: remove one of them")
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
        if self.moe and not self.moe_layers:
            raise ValueError(
                f"moe.every is {self.moe.every} and moe.dense_first {self.moe.dense_first}, so none of the "
                f"{self.layers} layers has experts"
            )
        if self.moe:
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
        for name in ("d_head", "attention_bias", "rope_scaling"):
            if getattr(self, name) is not None:
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
        if limits.function not in (None, self.architecture.expert_function):
            backbones = " or ".join(
                n for n, architecture in ARCHITECTURES.items() if architecture.expert_function == limits.function
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
        """Check that no option of decoders alone is set, and that an encoder can run the layers."""
        if self.backbone != "subln":
            raise ValueError(f"an encoder has the layers of backbone subln, not {self.backbone}: set backbone to subln")
        if self.document_masks:
            raise ValueError("document_masks is for decoders: a sample of an encoder has one text, so remove it")
        if self.rope_theta != type(self).model_fields["rope_theta"].default:
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
        """Check that no option of decoders or encoders is set, and that a vision model can run the layers."""
        fields = type(self).model_fields
        for key in ("vocab_size", "document_masks", "rope_theta", "tied_embeddings"):
            if getattr(self, key) != fields[key].default:
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

    @property
    def kind(self) -> ModelKind:
        """The kind of the model. The loss of all kinds but decoders is a sum over parts with different units."""
        if self.encoder is not None:
            return "encoder"
        return "decoder" if self.vision is None else "vision"

    @property
    def architecture(self) -> Architecture:
        """The options and counts of the backbone's architecture."""
        return ARCHITECTURES[self.backbone]

    def with_moe(self, moe: MoESpec | None) -> "ModelSpec":
        """Return a model with the same trunk and other expert layers; with None, the dense model.

        Dense layers get the default width if the trunk has none. The checks of the spec apply to the new model.
        """
        has_dense_layers = moe is None or moe.every > 1 or moe.dense_first > 0 or self.has_experts_beside
        d_ff = (self.d_ff or default_d_ff(self.d_model)) if has_dense_layers else None
        return ModelSpec.model_validate({**self.model_dump(exclude={"moe", "d_ff"}), "d_ff": d_ff, "moe": moe})

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether layer `layer` (counted from 0) is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.dense_first and (layer + 1) % self.moe.every == 0

    @property
    def recomputed_share(self) -> float:
        """The share of the routes whose hidden rows are recomputed in the backward instead of kept; 0 for a dense
        model."""
        moe = self.moe
        if moe is None:
            return 0.0
        if moe.router == "smear":
            return moe.recompute or 0.0
        if moe.kernel_limits.kept_rows != "as configured":
            return float(moe.kernel_limits.kept_rows == "nothing")
        if moe.recompute is not None:
            return moe.recompute
        # It keeps the memory of a layer with 4 heads near that of a plain one with the same work (kernels/README.md).
        return 0.6 if moe.d_expert >= 8 * self.row_width else 0.0

    @property
    def row_width(self) -> int:
        """The width D of the rows that the router and the experts of a layer compute on. The model must have
        mixture-of-experts layers."""
        assert self.moe is not None
        return self.moe.d_sub_token or self.d_model // self.moe.heads

    @property
    def joined_width(self) -> int:
        """The width h * D of all rows of a token together. The model must have mixture-of-experts layers."""
        assert self.moe is not None
        return self.moe.heads * self.row_width

    @property
    def projection_widths(self) -> list[int]:
        """The widths of the values before, between and after the linear layers of the head projection. Those of the
        merge projection are the same in reverse order. The model must have mixture-of-experts layers."""
        assert self.moe is not None
        # The inner width is h * D and not d, because a token passes ReLU unchanged only where its positive and its
        # negative parts have values of their own. If h * D is at least 2 d, several layers can be the identity.
        return [self.d_model, *[self.joined_width] * self.moe.projection_layers]

    @property
    def moe_layers(self) -> int:
        """The number of mixture-of-experts layers."""
        return sum(self.is_moe_layer(i) for i in range(self.layers))

    @property
    def has_experts_beside(self) -> bool:
        """True if layers with experts have dense feed-forward layers as well."""
        return self.encoder is not None and self.encoder.experts == "beside"

    @property
    def dense_layers(self) -> int:
        """The number of layers that have dense feed-forward layers."""
        return self.layers if self.has_experts_beside else self.layers - self.moe_layers

    @property
    def text_vocab_size(self) -> int:
        """The largest number of entries of a tokenizer: all rows of the embedding but the mask token."""
        return self.vocab_size - (self.encoder is not None)

    @property
    def is_random(self) -> bool:
        """True if a training step draws random numbers."""
        return self.dropout > 0 or self.attention_dropout > 0 or (self.moe is not None and self.moe.is_random)

    @property
    def n_kv_heads(self) -> int:
        """The number of heads of keys and values."""
        return self.kv_heads or self.attention_heads

    @property
    def head_width(self) -> int:
        return self.d_head or self.d_model // self.attention_heads

    @property
    def query_width(self) -> int:
        """The width of the queries of all heads."""
        return self.attention_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """The width of the keys of all heads, and of their values."""
        return self.n_kv_heads * self.head_width

    @property
    def biased_attention(self) -> AttentionBias:
        """The projections of attention that have a bias."""
        return self.attention_bias or self.architecture.attention_bias
