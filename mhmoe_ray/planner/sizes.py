"""Parameters, multiply-adds and bytes of a model, computed from the spec. Tests compare them with a built model."""

from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.adapters import adapted_parts, adapter_macs
from mhmoe_ray.planner.family import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    FEED_FORWARD,
    HEADS,
    MATCH,
    NORMS,
    OUTPUT,
    PATCHES,
    PROJECTIONS,
    ROUTER,
    SHARED,
    ModelPart,
    all_active,
    bytes_of,
    plan_of,
)
from mhmoe_ray.spec import ModelSpec, MoESpec, RunSpec
from mhmoe_ray.spec.model import default_d_ff


def bytes_per_value(spec: RunSpec) -> int:
    """Return the bytes per value of the operands of matrix products and of the rows that ranks exchange."""
    return bytes_of(spec.train.precision)


def dense_width(trunk: Mapping[str, Any]) -> int:
    """Return the feed-forward width of a `model` section, or its default; one that is not a number is a SpecError."""
    d_ff, d_model = trunk.get("d_ff"), trunk.get("d_model")
    if d_ff is None and isinstance(d_model, int):
        return default_d_ff(d_model)
    if not isinstance(d_ff, int):
        raise SpecError("model.d_ff", f"experts of a family follow from it, and it is {d_ff!r}", "give it a number")
    return d_ff


Counts = TypeVar("Counts")


class _SameModel(NamedTuple):
    """Key of a cache that finds a model by identity, because some models cannot be hashed."""

    model: ModelSpec

    def __hash__(self) -> int:
        return id(self.model)

    def __eq__(self, key: object) -> bool:
        return isinstance(key, _SameModel) and key.model is self.model


def cached_by_model(count: Callable[[ModelSpec], Counts]) -> Callable[[ModelSpec], Counts]:
    """Return a function that counts each of the last models once. A search for settings asks thousands of times."""
    cached = lru_cache(maxsize=64)(lambda key: count(key.model))

    @wraps(count)
    def cached_count(spec: ModelSpec) -> Counts:
        return cached(_SameModel(spec))

    return cached_count


class Sizes(NamedTuple):
    """Counts of a whole model."""

    parameters: int
    """Number of all parameters; a tied embedding counts once."""
    expert_parameters: int
    """Number of parameters of all routed experts."""
    active_parameters: int
    """Number of parameters that a token uses if its h sub-tokens are routed to min(h*k, E) different experts. With the
    router `smear` it uses all experts."""
    macs_per_token: int
    """Multiply-adds of all matrix products for one token or patch, with output logits, without attention scores.
    Outputs of encoders and heads of vision models are left out, because they compute for masked tokens and patches
    alone, or per image and object. So is the averaging by the router `smear`, which costs per sample (`merge_macs`)."""
    moe_macs_per_token: int
    """Multiply-adds of projections, routers, experts and shared experts for one token."""
    router_macs_per_token: int
    """Multiply-adds of the routers for one token, which arXiv 2404.15045 and 2411.16205 leave out of comparisons."""
    hidden_per_token: int
    """Number of hidden activations of routed experts for one token: h * k * f in each layer. At equal multiply-adds it
    grows with h, so models of equal compute differ in memory traffic."""


@cached_by_model
def model_parts(spec: ModelSpec) -> list[ModelPart]:
    """Return each kind of layer that a model has, from the embedding to the output."""
    moe, plan = spec.moe, plan_of(spec)
    embedding_parameters, norms = plan.embedding_rows(spec) * spec.d_model, _norm_parameters(spec)
    attention = _attention_parameters(spec)
    result = [
        ModelPart(EMBEDDING, 1, *all_active(embedding_parameters), 0),
        *plan.input_parts(spec),
        ModelPart(ATTENTION, spec.layers, plan.branches * attention, attention, attention_macs(spec)),
        ModelPart(NORMS, 1, *all_active(norms), 0),
    ]
    if spec.dense_layers:
        assert spec.d_ff is not None
        d, dense_architecture = spec.d_model, spec.architecture
        dense, macs = dense_architecture.expert_parameters(d, spec.d_ff), dense_architecture.expert_macs(d, spec.d_ff)
        result.append(ModelPart(FEED_FORWARD, spec.dense_layers, plan.branches * dense, dense, macs))
    if moe is not None:
        result += _moe_parts(spec, moe)
    return [*result, *plan.output_parts(spec)]


def _moe_parts(spec: ModelSpec, moe: MoESpec) -> list[ModelPart]:
    d, width, layers = spec.d_model, spec.row_width, spec.moe_layers
    expert = spec.architecture.expert_parameters(width, moe.d_expert)
    expert_macs = spec.architecture.expert_macs(width, moe.d_expert)
    routes, router, routers = moe.heads * moe.top_k, moe.router_sizes(width), plan_of(spec).routers(spec)
    used_experts = moe.experts if moe.router == "smear" else min(routes, moe.experts)
    result = [
        _projections_part(spec, moe),
        ModelPart(ROUTER, layers, routers * router.parameters, router.parameters, moe.heads * router.macs),
        # A token has `routes` routes but uses at most E experts, because its sub-tokens may share experts.
        ModelPart(EXPERTS, layers, moe.experts * expert, used_experts * expert, routes * expert_macs),
    ]
    if moe.d_shared:
        shared = spec.architecture.expert_parameters(d, moe.d_shared)
        result.append(ModelPart(SHARED, layers, *all_active(shared), spec.architecture.expert_macs(d, moe.d_shared)))
    return [part for part in result if part.parameters]


def _projections_part(spec: ModelSpec, moe: MoESpec) -> ModelPart:
    head_widths = spec.projection_widths
    sides = [head_widths] * moe.has_head_projection + [head_widths[::-1]] * moe.has_merge_projection
    shapes = [shape for widths in sides for shape in pairwise(widths)]
    macs = sum(in_width * out_width for in_width, out_width in shapes)
    biases = sum(out_width for _, out_width in shapes)
    return ModelPart(PROJECTIONS, spec.moe_layers, *all_active(macs + biases), macs)


class TrainedSizes(NamedTuple):
    """Numbers of parameters that a run trains: those of its adapter, or all."""

    parameters: int
    expert_parameters: int


def adapter_sizes(spec: RunSpec) -> TrainedSizes:
    """Return the numbers of parameters of a run's adapter; 0 without one."""
    parts = [(p.layers * p.copies * p.parameters, p.name == EXPERTS) for p in adapted_parts(spec)]
    return TrainedSizes(sum(count for count, _ in parts), sum(count for count, of_experts in parts if of_experts))


def trained_sizes(spec: RunSpec) -> TrainedSizes:
    """Return the numbers of parameters that a run trains."""
    sizes = compute_sizes(spec.model)
    return adapter_sizes(spec) if spec.train.adapter else TrainedSizes(sizes.parameters, sizes.expert_parameters)


@cached_by_model
def compute_sizes(spec: ModelSpec) -> Sizes:
    """Return the counts of a whole model."""
    all_parts, moe = model_parts(spec), spec.moe
    moe_parts = [p for p in all_parts if p.name in (PROJECTIONS, ROUTER, EXPERTS, SHARED)]
    return Sizes(
        parameters=sum(p.layers * p.parameters for p in all_parts),
        expert_parameters=sum(p.layers * p.parameters for p in all_parts if p.name == EXPERTS),
        active_parameters=sum(p.layers * p.active for p in all_parts),
        macs_per_token=sum(p.layers * p.macs for p in all_parts),
        moe_macs_per_token=sum(p.layers * p.macs for p in moe_parts),
        router_macs_per_token=sum(p.layers * p.macs for p in moe_parts if p.name == ROUTER),
        hidden_per_token=spec.moe_layers * moe.heads * moe.top_k * moe.d_expert if moe else 0,
    )


class BlockSizes(NamedTuple):
    """Numbers of parameters, without routed experts, of a dense block, of a block with experts, and outside blocks.

    The number for a kind of block that the model lacks is meaningless.
    """

    dense: int
    mixture: int
    outside: int
    """Number of parameters of the embedding, the final norm, and the output layer or heads."""


@cached_by_model
def block_sizes(spec: ModelSpec) -> BlockSizes:
    """Return the numbers of parameters in blocks and outside them."""
    parameters = {part.name: part.parameters for part in model_parts(spec)}
    outside_parts = (EMBEDDING, PATCHES, OUTPUT, MATCH, HEADS)
    outside_blocks = sum(parameters.get(name, 0) for name in outside_parts) + _final_norm_parameters(spec)
    shared = parameters[ATTENTION] + (parameters[NORMS] - _final_norm_parameters(spec)) // spec.layers
    dense = parameters.get(FEED_FORWARD, 0)
    mixture = sum(parameters.get(name, 0) for name in (PROJECTIONS, ROUTER, SHARED))
    mixture += dense if spec.has_experts_beside else 0
    return BlockSizes(shared + dense, shared + mixture, outside_blocks)


@cached_by_model
def float32_sizes(spec: ModelSpec) -> BlockSizes:
    """Return the numbers of parameters that fsdp gathers in float32: of norms, routers, and all that a family adds."""
    parameters = {part.name: part.parameters for part in model_parts(spec)}
    norms = (parameters[NORMS] - _final_norm_parameters(spec)) // spec.layers
    block = norms + _query_key_norm_parameters(spec)
    gathers_all = plan_of(spec).gathers_outside_in_float32
    outside = block_sizes(spec).outside if gathers_all else _final_norm_parameters(spec)
    return BlockSizes(block, block + parameters.get(ROUTER, 0), outside)


def float32_parameters(spec: ModelSpec) -> int:
    """Return the number of parameters of embeddings, norms and routers, which frozen matrices in bfloat16 leave out."""
    return sum(p.layers * p.parameters for p in model_parts(spec) if p.name in (EMBEDDING, NORMS, ROUTER))


def gathered_bytes(spec: RunSpec, parameters: int, float32_parameters: int) -> int:
    """Return the bytes of parameters that are gathered from shards; `float32_parameters` of them are always float32."""
    size = bytes_of(spec.cluster.gather_precision)
    return size * (parameters - float32_parameters) + FLOAT32 * float32_parameters


class Flops(NamedTuple):
    """Mean FLOPs per token, over all tokens of a sample. A multiply-add counts as two."""

    forward: int
    training: int
    """FLOPs of the forward and of the backward, which costs two forwards."""


def merge_macs(spec: ModelSpec) -> int:
    """Return the multiply-adds with which the router `smear` averages a layer's experts for one sample.

    They include those of the router's logits. The result is 0 for other routers.
    """
    moe = spec.moe
    if moe is None or moe.router != "smear":
        return 0
    return moe.experts * (spec.architecture.expert_parameters(spec.row_width, moe.d_expert) + spec.row_width)


def flops_per_token(spec: ModelSpec, attention_length: float, samples_per_token: float = 0.0) -> Flops:
    """Return the FLOPs per token of all matrix products, including attention scores and weighted values.

    Document masks do not lower them, although attention is then shorter. `attention_length` is the mean length in
    tokens of a token's sample. `samples_per_token` counts because the router `smear` averages experts once per sample.
    """
    # With causal attention, a token attends to (T + 1) / 2 keys on average. Each key costs as many multiply-adds as the
    # token's queries have values, once for its score and once for adding its value.
    keys = (attention_length + 1) / 2 if plan_of(spec).is_causal else attention_length
    scores = round(2 * spec.layers * spec.query_width * keys)
    merging = round(spec.moe_layers * merge_macs(spec) * samples_per_token)
    forward = 2 * (compute_sizes(spec).macs_per_token + scores + merging)
    return Flops(forward, 3 * forward)


def training_flops(spec: RunSpec) -> int:
    """Return the mean FLOPs per token that a run's training needs. Those of frozen weights' gradients are left out."""
    flops = flops_per_token(spec.model, spec.attention_length, spec.samples_per_token).training
    if spec.train.adapter:
        flops += 6 * adapter_macs(spec) - 2 * compute_sizes(spec.model).macs_per_token
    return flops


def _norm_parameters(spec: ModelSpec) -> int:
    return (spec.architecture.norms_per_block * spec.layers + 1) * _final_norm_parameters(spec)


def _final_norm_parameters(spec: ModelSpec) -> int:
    return plan_of(spec).branches * spec.architecture.norm_parameters(spec.d_model)


def attention_macs(spec: ModelSpec) -> int:
    """Return the multiply-adds of the four projections of one attention layer, for one token."""
    # The projections of queries and of the output have equally many multiply-adds, and so have those of keys and
    # values.
    return 2 * spec.d_model * (spec.query_width + spec.kv_width)


def _attention_parameters(spec: ModelSpec) -> int:
    qkv_width = spec.query_width + 2 * spec.kv_width
    bias_width = {"none": 0, "qkv": qkv_width, "all": qkv_width + spec.d_model}[spec.biased_attention]
    return attention_macs(spec) + bias_width + _query_key_norm_parameters(spec)


def _query_key_norm_parameters(spec: ModelSpec) -> int:
    return {"none": 0, "head": 2 * spec.head_width, "all": spec.query_width + spec.kv_width}[spec.qk_norm]


def model_flops_utilisation(spec: RunSpec, tokens_per_s: float, workers: int) -> float | None:
    """Return the model FLOPs utilisation of a run (MFU; PaLM, arXiv 2204.02311, appendix B), a fraction; None on CPUs.

    Recomputation does not count, and causal attention counts half. `tokens_per_s` is the speed of all workers together.
    """
    if not spec.cluster.gpus_per_worker:
        return None
    peak_flops = spec.cluster.accelerator.peak_flops(spec.train.precision)
    return training_flops(spec) * tokens_per_s / (workers * spec.cluster.gpus_per_worker * peak_flops)
