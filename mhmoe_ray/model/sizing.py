"""Parameters and multiply-adds from the spec alone: nothing is built. Tested equal to a built model."""

from typing import NamedTuple

from mhmoe_ray.spec import ModelSpec


class Sizes(NamedTuple):
    parameters: int
    """All of them; the tied embedding counts once."""
    expert_parameters: int
    """Those of all routed experts."""
    active_parameters: int
    """Those that one token's forward pass uses when its h sub-tokens meet min(h*k, E) different experts."""
    macs_per_token: int
    """Multiply-adds of all matrix products for one token, output logits included, attention scores not."""
    moe_macs_per_token: int
    """The part of the mixture-of-experts layers: projections, router and experts."""


def sizes(spec: ModelSpec) -> Sizes:
    d, moe = spec.d_model, spec.moe
    embedding = spec.vocab_size * d
    attention = 4 * d * d
    dense_ffn = 3 * d * spec.d_ff
    norms = (2 * spec.layers + 1) * d
    dense_layers = spec.layers - spec.moe_layers
    shared = embedding + norms + spec.layers * attention + dense_layers * dense_ffn
    macs = embedding + spec.layers * attention + dense_layers * dense_ffn
    if moe is None:
        return Sizes(shared, 0, shared, macs, 0)
    width = d // moe.heads
    projections = 2 * d * d if moe.heads > 1 else 0
    biases = 2 * d if moe.heads > 1 else 0
    router = moe.experts * width
    expert = 3 * width * moe.d_expert
    used = min(moe.heads * moe.top_k, moe.experts)
    layer_macs = projections + moe.heads * (router + moe.top_k * expert)
    outside = shared + spec.moe_layers * (projections + biases + router)
    return Sizes(
        parameters=outside + spec.moe_layers * moe.experts * expert,
        expert_parameters=spec.moe_layers * moe.experts * expert,
        active_parameters=outside + spec.moe_layers * used * expert,
        macs_per_token=macs + spec.moe_layers * layer_macs,
        moe_macs_per_token=spec.moe_layers * layer_macs,
    )
