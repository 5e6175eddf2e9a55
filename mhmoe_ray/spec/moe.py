"""The `model.moe` section: (multi-head) mixture-of-experts layers, their routers and their kernels.

Sizes have the papers' names: d (`d_model`), h (`heads`), E (`experts`), k (`top_k`), f (`d_expert`), and D
(`d_sub_token`), which is d / h in the papers. The first MH-MoE paper is arXiv 2404.15045, the second 2411.16205. Where
they or their code disagree, both readings are options, and the second's is the default. `mhmoe_kernels.abilities` has
the limits of each kernel.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import Field, PositiveFloat, model_validator

from mhmoe_kernels.abilities import KERNELS, KernelLimits, KernelName
from mhmoe_ray.spec.base import (
    ExpertCount,
    HeadCount,
    LayerCount,
    OptionalLayerCount,
    OptionalWidth,
    Section,
    Width,
    unmeasured,
)


class RouterSizes(NamedTuple):
    """Sizes of the router of one layer."""

    macs: int
    """Multiply-adds per row."""
    parameters: int
    saved_values: int
    """Values per row kept for the backward pass, besides logits and probabilities."""


def _linear_sizes(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=D * E, parameters=D * E, saved_values=0)


def _xmoe_sizes(E: int, D: int, Q: int) -> RouterSizes:
    # For the backward pass, the router saves cosines, and a second set of probabilities at the temperature of the load
    # balancing loss.
    return RouterSizes(macs=Q * (D + E), parameters=Q * (D + E) + 1, saved_values=2 * E + 4 * (Q + 1))


def _domain_sizes(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=0, parameters=0, saved_values=0)


def _smear_sizes(E: int, D: int, Q: int) -> RouterSizes:
    # The router computes logits once for each sample and not for each row, so they are not counted here:
    # `planner/sizes.py` counts them with the cost of merging the experts. Besides the router's matrix, the parameters
    # are the weight and the bias of one norm, and the gain of another.
    return RouterSizes(macs=0, parameters=D * E + 3 * D, saved_values=0)


def _torchscale_sizes(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=Q * (D + E), parameters=Q * (D + E), saved_values=Q)


class RouterTraits(NamedTuple):
    """Properties of a kind of router."""

    sizes: Callable[[int, int, int], RouterSizes]
    """Function (E, D, Q) -> sizes, for rows of D values that X-MoE's routers first project to Q values."""
    scores: str | None = None
    """Module and name of the `BaseScores` that computes logits; None if rows have no logits."""
    has_own_balance: bool = False
    """True if the load balancing loss uses other probabilities than the gates."""


ROUTERS: dict[str, RouterTraits] = {
    "linear": RouterTraits(_linear_sizes, "mhmoe_ray.model.router.scores:LinearScores"),
    "xmoe": RouterTraits(_xmoe_sizes, "mhmoe_ray.model.router.scores:XMoEScores", has_own_balance=True),
    "xmoe_torchscale": RouterTraits(_torchscale_sizes, "mhmoe_ray.model.router.scores:TorchscaleScores"),
    "domain": RouterTraits(_domain_sizes),
    "smear": RouterTraits(_smear_sizes),
}
"""All routers by their name in a spec (`model.moe.router`)."""
if TYPE_CHECKING:
    RouterName = str
else:
    RouterName = Literal[tuple(ROUTERS)]

_CHOICE_KEYS = (
    "gate_scale",
    "groups",
    "jitter",
    "noise",
    "capacity_factor",
    "balance_weight",
    "balance_over",
    "z_weight",
    "bias_rate",
)
"""Keys about the choice of experts for each row, which routers `domain` and `smear` refuse."""


class MoESpec(Section):
    """Options of mixture-of-experts layers. `heads: 1` is the plain sparse mixture of experts (SMoE)."""

    heads: HeadCount = 2
    """h: number of sub-tokens that each token is split into."""
    d_sub_token: Width | None = None
    """D: width of a sub-token, on which the router and the experts compute; by default d_model / heads. With another
    width, the first layer of the head projection maps d_model to heads * d_sub_token values, layers between keep that
    number, and the last layer of the merge projection maps them back."""
    experts: ExpertCount = 8
    """E: number of routed experts in each layer."""
    top_k: ExpertCount = 2
    """k: number of experts that each sub-token is routed to."""
    d_expert: Width
    """f: hidden width of one expert."""
    every: LayerCount = 2
    """Distance between mixture-of-experts layers: layer i (from 0) is one if i + 1 is a multiple of this number."""
    dense_first: OptionalLayerCount = 0
    """Number of layers at the start of the model that are dense, regardless of `every` (DeepSeek-V3)."""

    head_projection: bool | None = None
    """If true, there is a linear layer before the split into sub-tokens; by default only if h > 1."""
    merge_projection: bool | None = None
    """If true, there is a linear layer after the join of sub-tokens; by default only if h > 1."""
    projection_layers: int = Field(default=1, ge=1, le=3)
    """Number of linear layers in each of the head and merge projections, with ReLU between them (n in the ablations of
    the first MH-MoE paper)."""
    sub_token_residual: bool = False
    """If true, each sub-token is added to its experts' output before the merge projection. Equation 6 of the first
    MH-MoE paper does so, but none of the authors' code does."""
    d_shared: OptionalWidth = 0
    """Hidden width of a shared expert, which computes on every whole token besides the routed experts. 0: none."""

    router: RouterName = "linear"
    """Router. linear: softmax of W x (second MH-MoE paper). xmoe: X-MoE's router as published, the cosine of a
    projection with expert embeddings, divided by a learnable temperature. xmoe_torchscale: X-MoE's router as coded in
    torchscale and used for the first MH-MoE paper: 16 dimensions, only the expert embeddings normalized, and no
    temperature. domain: no router; each document goes to the expert of its domain (DEMix, arXiv 2108.05036). smear: for
    encoders; the weights of all experts are averaged into one expert for each sample (SMEAR, arXiv 2306.03745)."""
    domains: list[str] | None = Field(default=None, min_length=1)
    """Names of the experts of router `domain`, in their order: sources (`web`) or domains (`web/en`) of the data. A
    document goes to the expert with the name of its domain, or else to the one with the name of its source."""
    router_dim: Width | None = Field(default=None, ge=2)
    """Width of the projection of router xmoe; by default E / 2, as its authors advise. It must be at least 2: in one
    dimension a cosine is 1 or -1, and the router learns nothing."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Function from the router's logits to scores. softmax: over all experts. sigmoid: of each logit (DeepSeek-V3)."""
    normalize_gates: bool = False
    """If true, the k gates (routing weights) of a routed vector are divided by their sum (first MH-MoE paper, Mixtral).
    By default they are the raw scores (code of the second MH-MoE paper)."""
    gate_scale: PositiveFloat = 1.0
    """Factor by which all gates (routing weights) are multiplied (DeepSeek-V3's route scale)."""
    groups: ExpertCount = 1
    """Number of equal groups of experts for group-limited routing (DeepSeek-V3): only experts of the best `top_groups`
    groups are considered for a routed vector. A group's value is the sum of its two largest scores."""
    top_groups: ExpertCount = 1
    """Number of groups whose experts are considered for a routed vector."""
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability in training that router smear leaves an expert out of a sample's average (0.1 in SMEAR's runs)."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Router jitter: in training, the router's input is multiplied by uniform factors from 1 - jitter to 1 + jitter."""
    noise: float = Field(default=0.0, ge=0)
    """Noise of the router: normal noise of deviation noise / E on its logits in training (1 in V-MoE and AdaMV-MoE)."""
    capacity_factor: PositiveFloat | None = None
    """Capacity factor of static routing, which limits the rows (routed vectors) of an expert in training and
    validation. The expert capacity is this factor times k * ceil(N / E) for the N rows of a micro-batch. Rows beyond it
    are dropped; first choices have precedence over second choices. By default routing is dropless. Serving is always
    dropless, so that the rows of one request cannot displace those of another."""
    second_expert: Literal["always", "random"] = "always"
    """Use of the second choice. always: keep it. random: in training, keep a second choice of weight g with probability
    min(1, 2 g), as the runs of the first MH-MoE paper did."""

    balance_weight: float = Field(default=0.01, ge=0)
    """Factor of the load balancing loss, summed over layers; a uniform router costs exactly this much per layer."""
    balance: Literal["shares", "importance_load"] = "shares"
    """Load balancing loss. shares: each expert's mean probability times its share of the choices (code of both MH-MoE
    papers). importance_load: the squared coefficients of variation of the experts' importance and of their load
    (V-MoE), for which the router must have noise."""
    balance_choices: Literal["first", "all"] = "first"
    """Choices that the load balancing loss counts: the first of each row (code of both MH-MoE papers), or all k."""
    balance_over: Literal["micro_batch", "sequence", "step"] = "micro_batch"
    """Rows (routed vectors) over which the load balancing loss counts choices. micro_batch: the rows of a micro-batch
    (code of both MH-MoE papers). sequence: those of each sequence by itself (DeepSeek-V3). step: those of all
    micro-batches of all ranks (global batch, arXiv 2501.11873). The counts of a step are complete only at its end, so a
    step uses the counts of the step before it; the first step has no load balancing loss."""
    z_weight: float = Field(default=0.0, ge=0)
    """Factor of the router z-loss, which is the mean squared log-sum-exp of the router's logits, summed over layers."""
    bias_rate: float = Field(default=0.0, ge=0)
    """Rate of load balancing without a loss. After each step, an expert's selection bias rises by this rate if it had
    fewer rows (routed vectors) than the mean, and falls if it had more. The bias affects only the choice of experts."""

    kernel: Annotated[KernelName, unmeasured("sonicmoe", "deepgemm", "fp8", "cuda_graphs")] = "auto"
    """Kernel that runs routed vectors through the experts (kernels/README.md). auto: the fastest kernel that the
    hardware can run. cpp: compiled for the CPU on which it runs. capacity: the static layout of the MH-MoE papers, with
    masks of N x E x C values (rows x experts x expert capacity), for comparison."""
    recompute: float | None = Field(default=None, ge=0, le=1)
    """Share of the routes (choices of an expert for a routed vector) whose hidden rows are recomputed in the backward
    pass instead of kept. By default it is 0.6 if an expert is at least 8 times as wide as a routed vector, and
    otherwise 0. It applies to kernels grouped, grouped_gemm and grouped_mm, and to auto where that selects one of them.
    Of the other kernels, cpp and triton keep no hidden rows, and the rest keep all."""

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
        if key := self.changed_key(*_CHOICE_KEYS):
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
        if key := self.changed_key(*_CHOICE_KEYS, "d_sub_token", "sub_token_residual", "kernel", "recompute"):
            raise ValueError(f"router smear sends no rows to experts, so {key} would be ignored: remove it")
        for key in ("head_projection", "merge_projection"):
            if getattr(self, key):
                raise ValueError(f"router smear has no projections: remove {key}")

    def expert_of_domain(self, domain: str) -> int | None:
        """Return the index of the expert that router `domain` uses for a domain; None if there is none."""
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
        return KERNELS[self.kernel]

    def expert_capacity(self, rows: int, top_k: int | None = None) -> int | None:
        """Return an expert's largest number of rows, capacity_factor * k * ceil(N / E) rounded up; None if dropless."""
        # With factor 1 this is the capacity of the code of both MH-MoE papers: 2 * ceil(N / E) for the top-2 routing of
        # the first paper, and k * ceil(N / E) for the second.
        if self.capacity_factor is None:
            return None
        # The factor becomes an integer with nine decimal places, because in floating point 1.1 * 10 is above 11.
        factor_digits = max(1, round(self.capacity_factor * 10**9))
        return -(-factor_digits * (top_k or self.top_k) * -(-rows // self.experts) // 10**9)

    @property
    def is_random(self) -> bool:
        """True if routing draws random numbers in training."""
        return self.jitter > 0 or self.noise > 0 or self.second_expert == "random" or self.expert_dropout > 0

    @property
    def has_plain_routing(self) -> bool:
        """True if `fused_routing` can compute the routing: the k largest softmax scores and, of the load balancing
        losses, `balance: shares` over a micro-batch, from the probabilities of the gates."""
        return (
            self.scoring == "softmax"
            and not self.bias_rate
            and self.groups == 1
            and self.balance_over == "micro_batch"
            and self.balance == "shares"
            and not ROUTERS[self.router].has_own_balance
        )

    @property
    def routing_width(self) -> int:
        """Width Q of the projection in X-MoE's routers, which router `linear` ignores."""
        # The code of the first MH-MoE paper has no other width than 16.
        return 16 if self.router == "xmoe_torchscale" else self.router_dim or max(2, self.experts // 2)

    def router_sizes(self, width: int) -> RouterSizes:
        """Return the sizes of the router for rows of width `width`."""
        return ROUTERS[self.router].sizes(self.experts, width, self.routing_width)
