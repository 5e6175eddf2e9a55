"""Parameters, multiply-adds and bytes of a model, computed from the spec without building the model.

Tests compare the numbers with those of a built model.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.heads import head_parameters, stem_sizes
from mhmoe_ray.spec import EncoderSpec, ModelSpec, MoESpec, RunSpec
from mhmoe_ray.spec.base import Precision
from mhmoe_ray.spec.model import default_d_ff

# Bytes per value of the integer types.
INT32 = 4
INT64 = 8


def bytes_of(precision: Precision) -> int:
    """Return the number of bytes that a value takes in a precision."""
    return 2 if precision == "bfloat16" else FLOAT32


def bytes_per_value(spec: RunSpec) -> int:
    """Return the bytes per value of the operands of matrix products and of the rows that ranks exchange."""
    return bytes_of(spec.train.precision)


def dense_width(trunk: Mapping[str, Any]) -> int:
    """Return the feed-forward width of a trunk (a `model` section without `moe`), or the default width if it has none.

    The expert widths of presets are fractions of this width.

    Raises:
        SpecError: `d_ff` is not a number, or it is missing and `d_model` is not a number.
    """
    d_ff, d_model = trunk.get("d_ff"), trunk.get("d_model")
    if d_ff is None and isinstance(d_model, int):
        return default_d_ff(d_model)
    if not isinstance(d_ff, int):
        raise SpecError("model.d_ff", f"experts of a family follow from it, and it is {d_ff!r}", "give it a number")
    return d_ff


class Part(NamedTuple):
    """Part of a model: one kind of layer, with the counts of a single layer of this kind."""

    name: str
    layers: int
    """Number of layers of this kind."""
    parameters: int
    active: int
    """Number of parameters that one token's forward pass uses."""
    macs: int
    """Multiply-adds of matrix products for one token."""


class Sizes(NamedTuple):
    """Counts of a whole model: parameters, and multiply-adds and hidden activations per token."""

    parameters: int
    """Number of all parameters; a tied embedding counts once."""
    expert_parameters: int
    """Number of parameters of all routed experts."""
    active_parameters: int
    """Number of parameters that one token's forward pass uses if its h sub-tokens are routed to min(h*k, E) different
    experts. With the router `smear`, which averages experts, it uses all experts."""
    macs_per_token: int
    """Multiply-adds of all matrix products for one token, including output logits, without attention scores. For an
    encoder, patches count as tokens, and outputs are left out, because they are computed for hidden (masked) tokens and
    patches alone. For a vision model, patches count as tokens, and heads are left out, because they compute per image
    and per object. The averaging of experts by the router `smear` costs per sample (`merge_macs`), and is left out as
    well."""
    moe_macs_per_token: int
    """Multiply-adds of the mixture-of-experts layers for one token: projections, router, experts and shared expert."""
    router_macs_per_token: int
    """Multiply-adds of the routers for one token. The papers arXiv 2404.15045 and 2411.16205 leave them out when they
    compare the compute of models."""
    hidden_per_token: int
    """Number of hidden activations of routed experts for one token: h sub-tokens times k experts times the expert width
    f in each layer. At equal multiply-adds it grows with h, so models of equal compute differ in memory traffic."""


EMBEDDING, PATCHES, NORMS, OUTPUT = "embedding", "patches", "norms", "output"
PROJECTIONS, ROUTER, EXPERTS, SHARED = "projections", "router", "experts", "shared expert"
MATCH, HEADS = "match", "heads"
"""Names of the parts of a model (`Part.name`) that other modules look up."""


def model_parts(spec: ModelSpec) -> list[Part]:
    """Return the counts of each kind of layer that a model has, from the embedding to the output."""
    d, moe, branches = spec.d_model, spec.moe, _branches(spec)
    embedding_parameters, norms = _embedding_parameters(spec), _norm_parameters(spec)
    attention = _attention_parameters(spec)
    result = [Part(EMBEDDING, 1, *_all_active(embedding_parameters), 0)]
    if spec.encoder is not None:
        projection = spec.encoder.patch_values * d
        result.append(Part(PATCHES, 1, *_all_active(projection + d), projection))
    if spec.vision is not None:
        stem = stem_sizes(spec, spec.vision)
        result.append(Part(PATCHES, 1, len(spec.vision.tasks) * stem.parameters, *stem))
    result += [
        Part("attention", spec.layers, branches * attention, attention, attention_macs(spec)),
        Part(NORMS, 1, *_all_active(norms), 0),
    ]
    if spec.dense_layers:
        assert spec.d_ff is not None
        dense, macs = spec.architecture.expert_parameters(d, spec.d_ff), spec.architecture.expert_macs(d, spec.d_ff)
        result.append(Part("feed-forward", spec.dense_layers, branches * dense, dense, macs))
    if moe is not None:
        result += _moe_parts(spec, moe)
    if spec.encoder is not None:
        return [*result, *_head_parts(spec, spec.encoder)]
    if spec.vision is not None:
        # A patch uses only the head of its own task, so the active parameters are those of the largest head.
        heads = [head_parameters(spec, task) for task in spec.vision.tasks.values()]
        return [*result, Part(HEADS, 1, sum(heads), max(heads), 0)]
    # With tied embeddings the output has no parameters of its own, but its product still counts.
    output_parameters = 0 if spec.tied_embeddings else embedding_parameters
    return [*result, Part(OUTPUT, 1, output_parameters, output_parameters, embedding_parameters)]


def _branches(spec: ModelSpec) -> int:
    """Return how many copies of attention, norms and feed-forward layers a block has: one per modality of the model."""
    return 1 if spec.encoder is None else 2


def _embedding_parameters(spec: ModelSpec) -> int:
    """Return the number of parameters of all embeddings.

    For an encoder or a vision model they include embeddings of positions. An encoder also has an embedding for an image
    as a whole and one for hidden (masked) patches.
    """
    rows, encoder, vision = spec.vocab_size, spec.encoder, spec.vision
    if vision is not None:
        rows += sum(vision.patches(task) for task in vision.tasks.values())
    if encoder is not None:
        rows += encoder.text_positions + (encoder.image_positions or encoder.image_tokens) + 2
    return rows * spec.d_model


def _head_parts(spec: ModelSpec, encoder: EncoderSpec) -> list[Part]:
    """Return the parts (counts by kind) of an encoder's heads: outputs, and the head that matches images with texts."""
    outputs = (spec.d_model + 1) * (encoder.target_values + spec.vocab_size)
    result = [Part(OUTPUT, 1, *_all_active(outputs), 0)]
    if encoder.d_match is not None:
        result.append(Part(MATCH, 1, *_all_active(2 * spec.d_model * encoder.d_match + 1), 0))
    return result


def _moe_parts(spec: ModelSpec, moe: MoESpec) -> list[Part]:
    """Return the parts of the mixture-of-experts layers that have parameters: projections, router and experts."""
    d, width, layers = spec.d_model, spec.row_width, spec.moe_layers
    expert = spec.architecture.expert_parameters(width, moe.d_expert)
    expert_macs = spec.architecture.expert_macs(width, moe.d_expert)
    routes, router = moe.heads * moe.top_k, moe.router_sizes(width)
    routers = 2 if spec.encoder is not None and spec.encoder.routers == "per_modality" else 1
    if spec.vision is not None and spec.vision.routers == "per_task":
        routers = len(spec.vision.tasks)
    used_experts = moe.experts if moe.router == "smear" else min(routes, moe.experts)
    result = [
        _projections_part(spec, moe),
        Part(ROUTER, layers, routers * router.parameters, router.parameters, moe.heads * router.macs),
        # A token has `routes` routes but uses at most E experts, because its sub-tokens may share experts.
        Part(EXPERTS, layers, moe.experts * expert, used_experts * expert, routes * expert_macs),
    ]
    if moe.d_shared:
        shared = spec.architecture.expert_parameters(d, moe.d_shared)
        result.append(Part(SHARED, layers, *_all_active(shared), spec.architecture.expert_macs(d, moe.d_shared)))
    return [part for part in result if part.parameters]


def _projections_part(spec: ModelSpec, moe: MoESpec) -> Part:
    """Return the counts of the head and merge projections of a mixture-of-experts layer, as a part of the model."""
    head_widths = spec.projection_widths
    sides = [head_widths] * moe.has_head_projection + [head_widths[::-1]] * moe.has_merge_projection
    shapes = [shape for widths in sides for shape in pairwise(widths)]
    macs = sum(in_width * out_width for in_width, out_width in shapes)
    biases = sum(out_width for _, out_width in shapes)
    return Part(PROJECTIONS, spec.moe_layers, *_all_active(macs + biases), macs)


def compute_sizes(spec: ModelSpec) -> Sizes:
    """Return the numbers of parameters, multiply-adds and hidden activations of a whole model."""
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
    """Numbers of parameters of blocks and of everything outside them, without routed experts."""

    dense: int
    """Number of parameters of a block without experts; meaningless if the model has no such block."""
    mixture: int
    """Number of parameters of a block with experts, not counting its routed experts; meaningless if the model has no
    such block."""
    outside: int
    """Number of parameters of the embedding, the final norm, and the output layer or heads."""


def block_sizes(spec: ModelSpec) -> BlockSizes:
    """Return the numbers of parameters in a dense block, in a block with experts, and outside blocks."""
    parameters = {part.name: part.parameters for part in model_parts(spec)}
    outside_parts = (EMBEDDING, PATCHES, OUTPUT, MATCH, HEADS)
    outside_blocks = sum(parameters.get(name, 0) for name in outside_parts) + _final_norm_parameters(spec)
    shared = parameters["attention"] + (parameters[NORMS] - _final_norm_parameters(spec)) // spec.layers
    dense = parameters.get("feed-forward", 0)
    mixture = sum(parameters.get(name, 0) for name in (PROJECTIONS, ROUTER, SHARED))
    mixture += dense if spec.has_experts_beside else 0
    return BlockSizes(shared + dense, shared + mixture, outside_blocks)


def float32_sizes(spec: ModelSpec) -> BlockSizes:
    """Return the numbers of parameters of norms and routers, which always compute in float32.

    For a vision model, the number outside blocks includes its inputs and heads, which fsdp gathers in float32.
    """
    parameters = {part.name: part.parameters for part in model_parts(spec)}
    norms = (parameters[NORMS] - _final_norm_parameters(spec)) // spec.layers
    block = norms + _query_key_norm_parameters(spec)
    outside = block_sizes(spec).outside if spec.vision is not None else _final_norm_parameters(spec)
    return BlockSizes(block, block + parameters.get(ROUTER, 0), outside)


def gathered_bytes(spec: RunSpec, parameters: int, float32_parameters: int) -> int:
    """Return the bytes of parameters that are gathered from shards; `float32_parameters` of them are always float32."""
    size = bytes_of(spec.cluster.gather_precision)
    return size * (parameters - float32_parameters) + FLOAT32 * float32_parameters


class Flops(NamedTuple):
    """Mean FLOPs per token, over all tokens of a sample. A multiply-add counts as two."""

    forward: int
    training: int
    """FLOPs of the forward and of the backward, which costs twice as much as the forward."""


def merge_macs(spec: ModelSpec) -> int:
    """Return the multiply-adds with which the router `smear` averages the experts of a layer for one sample.

    They include those of the router's logits. The result is 0 for other routers.
    """
    moe = spec.moe
    if moe is None or moe.router != "smear":
        return 0
    return moe.experts * (spec.architecture.expert_parameters(spec.row_width, moe.d_expert) + spec.row_width)


def flops_per_token(spec: ModelSpec, attention_length: float, samples_per_token: float = 0.0) -> Flops:
    """Return the FLOPs per token of all matrix products, including attention scores and weighted values.

    The numbers are the same with document masks, although attention is then shorter.

    Args:
        spec: spec of the model.
        attention_length: mean length in tokens of the sample that a token belongs to (`RunSpec.attention_length`).
        samples_per_token: number of samples in a micro-batch divided by its number of tokens
            (`RunSpec.samples_per_token`), because the router `smear` averages experts once per sample.
    """
    # With causal attention, a token attends to (T + 1) / 2 keys on average. Each key costs as many multiply-adds as the
    # token's queries have values, once for its score and once for adding its value.
    is_causal = spec.encoder is None and spec.vision is None
    keys = (attention_length + 1) / 2 if is_causal else attention_length
    scores = round(2 * spec.layers * spec.query_width * keys)
    merging = round(spec.moe_layers * merge_macs(spec) * samples_per_token)
    forward = 2 * (compute_sizes(spec).macs_per_token + scores + merging)
    return Flops(forward, 3 * forward)


def _all_active(parameters: int) -> tuple[int, int]:
    """Return the fields `parameters` and `active` of a part whose parameters are all used for every token."""
    return parameters, parameters


def _norm_parameters(spec: ModelSpec) -> int:
    """Return the number of parameters of all norms over whole tokens, including the final one."""
    norms_of_blocks = _branches(spec) * spec.architecture.norms_per_block * spec.layers * _parameters_per_norm(spec)
    return norms_of_blocks + _final_norm_parameters(spec)


def _final_norm_parameters(spec: ModelSpec) -> int:
    return _branches(spec) * _parameters_per_norm(spec)


def _parameters_per_norm(spec: ModelSpec) -> int:
    return spec.architecture.norm_parameters(spec.d_model)


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
    """Return the number of parameters of the norms of queries and keys in one attention layer."""
    return {"none": 0, "head": 2 * spec.head_width, "all": spec.query_width + spec.kv_width}[spec.qk_norm]


def model_flops_utilisation(spec: RunSpec, tokens_per_s: float, workers: int) -> float | None:
    """Return the model FLOPs utilization (MFU; PaLM, arXiv 2204.02311, appendix B) of a run at a given speed.

    It is the ratio of the FLOP/s that the model needs at this speed to the peak of its accelerators. Recomputation does
    not count, and causal attention counts half.

    Args:
        spec: spec of the run; its `cluster.accelerator` gives the peak.
        tokens_per_s: tokens per second of all workers together.
        workers: number of workers, each with `cluster.gpus_per_worker` GPUs.

    Returns:
        The utilization as a fraction; None on CPUs, whose peak is not known.
    """
    if not spec.cluster.gpus_per_worker:
        return None
    peak_flops = spec.cluster.accelerator.peak_flops(spec.train.precision)
    needed_flops = flops_per_token(spec.model, spec.attention_length, spec.samples_per_token).training * tokens_per_s
    return needed_flops / (workers * spec.cluster.gpus_per_worker * peak_flops)
