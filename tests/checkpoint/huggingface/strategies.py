"""Hypothesis strategies for specs of models."""

from hypothesis import strategies as st

from mhmoe_ray.architectures import ARCHITECTURES
from mhmoe_ray.model.router import SCORES_BY_ROUTER
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.support.decoders import BACKBONES


@st.composite
def model_specs(draw) -> ModelSpec:
    """Draw the spec of a small model of any architecture, with or without mixture-of-experts layers."""
    backbone = draw(st.sampled_from(BACKBONES))
    heads = draw(st.sampled_from([1, 2, 4]))
    head, merge = draw(st.tuples(*[st.none() | st.booleans()] * 2))
    is_projected = [heads > 1 if projection is None else projection for projection in (head, merge)]
    layers = draw(st.integers(1, 3))
    moe = MoESpec(
        heads=heads,
        d_sub_token=draw(st.sampled_from([None, 3, 16])) if all(is_projected) else None,
        experts=draw(st.integers(2, 12)),
        d_expert=draw(st.integers(1, 6)),
        every=draw(st.integers(1, layers)),
        head_projection=head,
        merge_projection=merge,
        projection_layers=draw(st.integers(1, 3)) if any(is_projected) else 1,
        d_shared=draw(st.integers(0, 3)),
        router=draw(st.sampled_from(list(SCORES_BY_ROUTER))),
        bias_rate=draw(st.sampled_from([0.0, 0.1])),
    )
    moe = draw(st.sampled_from([moe, moe, None]))
    return ModelSpec(
        backbone=backbone,
        vocab_size=7,
        d_model=16,
        layers=layers,
        attention_heads=4,
        kv_heads=draw(st.sampled_from([None, 1, 2])) if ARCHITECTURES[backbone].grouped_queries else None,
        d_ff=None if moe and moe.every == 1 else draw(st.integers(1, 5)),
        tied_embeddings=draw(st.booleans()),
        moe=moe,
    )
