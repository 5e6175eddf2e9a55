"""Parameters, multiply-adds and bytes, computed from the spec alone without building the model. Tests compare them with
a built model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import ModelSpec, MoESpec, RunSpec
from mhmoe_ray.spec.model import usual_width

INT32 = 4
INT64 = 8


def compute_bytes(spec: RunSpec) -> int:
    """Return the bytes per value in matrix products and in the rows that ranks exchange."""
    return 2 if spec.train.precision == "bfloat16" else FLOAT32


def dense_width(trunk: Mapping[str, Any]) -> int:
    """Return the width that a family's expert widths are derived from: the trunk's own feed-forward width, or the usual
    one if it has none.

    Raises:
        SpecError: `d_ff` is not a number, or it is missing and `d_model` is not a number.
    """
    d_ff, d_model = trunk.get("d_ff"), trunk.get("d_model")
    if d_ff is None and isinstance(d_model, int):
        return usual_width(d_model)
    if not isinstance(d_ff, int):
        raise SpecError("model.d_ff", f"experts of a family follow from it, and it is {d_ff!r}", "give it a number")
    return d_ff


class Part(NamedTuple):
    """Counts for one kind of layer; the numbers are those of a single layer."""

    name: str
    layers: int
    """Number of layers of this kind."""
    parameters: int
    active: int
    """Number of parameters that one token's forward pass uses."""
    macs: int
    """Multiply-adds of matrix products for one token."""


class Sizes(NamedTuple):
    parameters: int
    """Number of all parameters; a tied embedding counts once."""
    expert_parameters: int
    """Number of parameters of all routed experts."""
    active_parameters: int
    """Number of parameters that one token's forward pass uses when its h sub-tokens go to min(h*k, E) different
    experts."""
    macs_per_token: int
    """Multiply-adds of all matrix products for one token, including output logits, without attention scores."""
    moe_macs_per_token: int
    """Multiply-adds of the mixture-of-experts layers for one token: projections, router, experts and shared expert."""
    router_macs_per_token: int
    """Multiply-adds of the routers for one token, which both papers leave out when they match compute."""
    hidden_per_token: int
    """Number of hidden activations of routed experts for one token, h * k * f in each layer. At equal multiply-adds it
    grows with h: matched compute is not matched memory traffic."""


EMBEDDING, NORMS = "embedding", "norms"
PROJECTIONS, ROUTER, EXPERTS, SHARED = "projections", "router", "experts", "shared expert"
"""Names of the parts that other modules look up."""


def parts(spec: ModelSpec) -> list[Part]:
    """Return the parts of the model from the embedding to the output, without those that the model lacks."""
    d, moe, dense_layers = spec.d_model, spec.moe, spec.layers - spec.moe_layers
    table, norms = spec.vocab_size * d, _norms(spec)
    found = [
        Part(EMBEDDING, 1, table, table, 0),
        Part("attention", spec.layers, *_all_active(_attention(spec)), attention_macs(spec)),
        Part(NORMS, 1, *_all_active(norms), 0),
    ]
    if dense_layers:
        assert spec.d_ff is not None
        dense, macs = spec.architecture.expert_parameters(d, spec.d_ff), spec.architecture.expert_macs(d, spec.d_ff)
        found.append(Part("feed-forward", dense_layers, *_all_active(dense), macs))
    if moe is not None:
        found += _moe_parts(spec, moe)
    own = 0 if spec.tied_embeddings else table
    return [*found, Part("output", 1, own, own, table)]


def _moe_parts(spec: ModelSpec, moe: MoESpec) -> list[Part]:
    d, width, layers = spec.d_model, spec.d_model // moe.heads, spec.moe_layers
    projections = (moe.has_head + moe.has_merge) * moe.projection_layers
    expert = spec.architecture.expert_parameters(width, moe.d_expert)
    expert_macs = spec.architecture.expert_macs(width, moe.d_expert)
    routes, router = moe.heads * moe.top_k, moe.router_sizes(width)
    found = [
        Part(PROJECTIONS, layers, *_all_active(projections * (d * d + d)), projections * d * d),
        Part(ROUTER, layers, *_all_active(router.parameters), moe.heads * router.macs),
        Part(EXPERTS, layers, moe.experts * expert, min(routes, moe.experts) * expert, routes * expert_macs),
    ]
    if moe.d_shared:
        shared = spec.architecture.expert_parameters(d, moe.d_shared)
        found.append(Part(SHARED, layers, *_all_active(shared), spec.architecture.expert_macs(d, moe.d_shared)))
    return [part for part in found if part.parameters]


def sizes(spec: ModelSpec) -> Sizes:
    found, moe = parts(spec), spec.moe
    moe_parts = [p for p in found if p.name in (PROJECTIONS, ROUTER, EXPERTS, SHARED)]
    return Sizes(
        parameters=sum(p.layers * p.parameters for p in found),
        expert_parameters=sum(p.layers * p.parameters for p in found if p.name == EXPERTS),
        active_parameters=sum(p.layers * p.active for p in found),
        macs_per_token=sum(p.layers * p.macs for p in found),
        moe_macs_per_token=sum(p.layers * p.macs for p in moe_parts),
        router_macs_per_token=sum(p.layers * p.macs for p in moe_parts if p.name == ROUTER),
        hidden_per_token=spec.moe_layers * moe.heads * moe.top_k * moe.d_expert if moe else 0,
    )


class Blocks(NamedTuple):
    """Number of parameters by the modules that hold them, without routed experts."""

    dense: int
    """Parameters of a block without experts, if the model has any."""
    mixture: int
    """Parameters of a block with experts, if the model has any, without the routed experts."""
    outside: int
    """Parameters of the embedding, the final norm and the output layer."""


def blocks(spec: ModelSpec) -> Blocks:
    of = {part.name: part.parameters for part in parts(spec)}
    outside = of[EMBEDDING] + of["output"] + _per_norm(spec)
    every = of["attention"] + (of[NORMS] - _per_norm(spec)) // spec.layers
    mixture = sum(of.get(name, 0) for name in (PROJECTIONS, ROUTER, SHARED))
    return Blocks(every + of.get("feed-forward", 0), every + mixture, outside)


class Flops(NamedTuple):
    """FLOPs per token, with a multiply-add counted as two: the mean over a causal sequence, whose tokens see those
    before them."""

    forward: int
    training: int
    """FLOPs of the forward, and of the backward at twice its cost."""


def flops_per_token(spec: ModelSpec, seq_len: int) -> Flops:
    """Return the FLOPs per token of all matrix products, including attention scores and weighted values, with (T + 1) /
    2 keys per token on average.

    Document masks do not reduce them.
    """
    scores = spec.layers * spec.d_model * (seq_len + 1)
    forward = 2 * (sizes(spec).macs_per_token + scores)
    return Flops(forward, 3 * forward)


def _all_active(parameters: int) -> tuple[int, int]:
    return parameters, parameters


def _norms(spec: ModelSpec) -> int:
    """Return the number of parameters of all norms over whole tokens, including the final one."""
    return (spec.architecture.norms_per_block * spec.layers + 1) * _per_norm(spec)


def _per_norm(spec: ModelSpec) -> int:
    return spec.architecture.norm_parameters(spec.d_model)


def attention_macs(spec: ModelSpec) -> int:
    """Return the multiply-adds of the four projections of one attention layer, for one token."""
    kv_width = spec.n_kv_heads * spec.head_width
    return 2 * spec.d_model * (spec.d_model + kv_width)


def _attention(spec: ModelSpec) -> int:
    return attention_macs(spec) + spec.architecture.attention_biases * spec.d_model


def model_flops_utilisation(spec: RunSpec, tokens_per_s: float, workers: int) -> float | None:
    """Return the model FLOPs utilization (MFU; PaLM, arXiv 2204.02311, appendix B): the FLOPs that the model needs,
    over those that its accelerators could do at peak.

    Recomputation does not count, and attention counts with only the half that a causal mask leaves.

    Args:
        spec: spec of the run; its `cluster.accelerator` gives the peak.
        tokens_per_s: tokens per second of all workers together.
        workers: number of workers, each with `cluster.gpus_per_worker` GPUs.

    Returns:
        The utilization as a share of 1; None on CPUs, whose peak is not known.
    """
    if not spec.cluster.gpus_per_worker:
        return None
    peak = spec.cluster.accelerator.peak(spec.train.precision)
    needed = flops_per_token(spec.model, spec.data.seq_len).training * tokens_per_s
    return needed / (workers * spec.cluster.gpus_per_worker * peak)
