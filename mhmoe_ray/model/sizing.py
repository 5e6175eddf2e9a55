"""Parameters and multiply-adds from the spec alone: nothing is built. Tested equal to a built model."""

from typing import NamedTuple

from mhmoe_ray.spec import ModelSpec, MoESpec


class Sizes(NamedTuple):
    parameters: int
    """All of them; a tied embedding counts once."""
    expert_parameters: int
    """Those of all routed experts."""
    active_parameters: int
    """Those that one token's forward pass uses when its h sub-tokens meet min(h*k, E) different experts."""
    macs_per_token: int
    """Multiply-adds of all matrix products for one token, output logits included, attention scores not."""
    moe_macs_per_token: int
    """The part of the mixture-of-experts layers: projections, router, experts and shared expert."""
    hidden_per_token: int
    """Hidden activations of routed experts for one token, h * k * f in each layer. At equal multiply-adds they grow
    with h: matched compute is not matched memory traffic."""


def sizes(spec: ModelSpec) -> Sizes:
    d, moe, dense = spec.d_model, spec.moe, spec.layers - spec.moe_layers
    output = spec.vocab_size * d
    shared = output * (1 if spec.tied_embeddings else 2) + _norms(spec)
    shared += spec.layers * _attention(spec) + dense * _feed_forward(spec, d, spec.d_ff)
    macs = output + spec.layers * _attention_macs(spec) + dense * _feed_forward_macs(spec, d, spec.d_ff)
    if moe is None:
        return Sizes(shared, 0, shared, macs, 0, 0)
    width = d // moe.heads
    expert = _feed_forward(spec, width, moe.d_expert)
    shared_expert = _feed_forward(spec, d, moe.d_shared) if moe.d_shared else 0
    projections = (moe.has_head + moe.has_merge) * moe.projection_layers
    outside = shared + spec.moe_layers * (projections * (d * d + d) + _router(moe, width) + shared_expert)
    layer_macs = projections * d * d + moe.heads * _router_macs(moe, width)
    layer_macs += moe.heads * moe.top_k * _feed_forward_macs(spec, width, moe.d_expert)
    layer_macs += _feed_forward_macs(spec, d, moe.d_shared)
    used = min(moe.heads * moe.top_k, moe.experts)
    return Sizes(
        parameters=outside + spec.moe_layers * moe.experts * expert,
        expert_parameters=spec.moe_layers * moe.experts * expert,
        active_parameters=outside + spec.moe_layers * used * expert,
        macs_per_token=macs + spec.moe_layers * layer_macs,
        moe_macs_per_token=spec.moe_layers * layer_macs,
        hidden_per_token=spec.moe_layers * moe.heads * moe.top_k * moe.d_expert,
    )


def _norms(spec: ModelSpec) -> int:
    """Two per layer and a last one; LayerNorms have a bias too, and subln has another inside attention."""
    per_norm = spec.d_model * (1 if spec.backbone == "llama" else 2)
    in_layer = 2 if spec.backbone == "llama" else 3
    return (in_layer * spec.layers + 1) * per_norm


def _attention_macs(spec: ModelSpec) -> int:
    kv_width = spec.n_kv_heads * spec.head_width
    return 2 * spec.d_model * (spec.d_model + kv_width)


def _attention(spec: ModelSpec) -> int:
    biases = 4 * spec.d_model if spec.backbone == "subln" else 0
    return _attention_macs(spec) + biases


def _feed_forward_macs(spec: ModelSpec, width: int, hidden: int) -> int:
    return (3 if spec.backbone == "llama" else 2) * width * hidden


def _feed_forward(spec: ModelSpec, width: int, hidden: int) -> int:
    """With subln: two biases, and weight and bias of the inner norm."""
    extra = 3 * hidden + width if spec.backbone == "subln" else 0
    return _feed_forward_macs(spec, width, hidden) + extra


def _router_macs(moe: MoESpec, width: int) -> int:
    if moe.router == "linear":
        return width * moe.experts
    return moe.routing_width * (width + moe.experts)


def _router(moe: MoESpec, width: int) -> int:
    return _router_macs(moe, width) + (moe.router == "xmoe")  # the temperature
