"""Hypothesis strategies for mixture-of-experts layers, over all options of a spec."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.model.router import SCORES_BY_ROUTER
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.support.decoders import BACKBONES

WIDTH = 24


class LayerCase(NamedTuple):
    """A mixture-of-experts layer, the options that it was built with, and an input for it."""

    layer: MultiHeadMoE
    moe: MoESpec
    x_BTM: torch.Tensor


@st.composite
def specs(draw: st.DrawFn, **fixed: Any) -> ModelSpec:
    """Draw the spec of a model with one layer. The fields of MoESpec that are in `fixed`, and a `backbone` in it, have
    those values instead of drawn ones."""
    experts = fixed.get("experts", draw(st.integers(1, 7), label="E"))
    top_k = fixed.get("top_k", draw(st.integers(1, experts), label="k"))
    fields = {
        "experts": experts,
        "top_k": top_k,
        "d_expert": draw(st.integers(1, 6), label="f"),
        "every": 1,
        "heads": draw(st.sampled_from([1, 2, 3, 4, 6]), label="h"),
        "router": draw(st.sampled_from(list(SCORES_BY_ROUTER))),
        "kernel": draw(st.sampled_from(["grouped", "reference"])),
        "capacity_factor": draw(st.sampled_from([None, 0.2, 0.7, 1.0, 1.5])),
        "normalize_gates": top_k > 1 and draw(st.booleans(), label="normalised"),
        "head_projection": draw(st.sampled_from([None, False, True])),
        "merge_projection": draw(st.sampled_from([None, False, True])),
        "sub_token_residual": draw(st.booleans(), label="residual"),
        "d_shared": draw(st.sampled_from([0, 5])),
        "balance_choices": draw(st.sampled_from(["first", "all"] if top_k > 1 else ["first"])),
    }
    fields |= fixed
    is_projected = [
        fields["heads"] > 1 if fields[key] is None else fields[key] for key in ("head_projection", "merge_projection")
    ]
    if all(is_projected):
        fields.setdefault("d_sub_token", draw(st.sampled_from([None, None, 5, WIDTH]), label="D"))
    if any(is_projected):
        fields.setdefault("projection_layers", draw(st.sampled_from([1, 1, 2])))
    backbone = fields.pop("backbone", None) or draw(st.sampled_from(BACKBONES))
    moe = MoESpec(**fields)
    return ModelSpec(backbone=backbone, vocab_size=9, d_model=WIDTH, layers=1, attention_heads=2, moe=moe)


@st.composite
def layers(
    draw: st.DrawFn, batch: tuple[int, int] = (1, 4), dtype: torch.dtype = torch.float64, **fixed: Any
) -> LayerCase:
    """Draw a layer with random weights, and an input of 1 to 5 tokens per sequence.

    `batch` has the least and the largest number of sequences. `fixed` has options that are not drawn, as in `specs`.
    """
    spec = draw(specs(**fixed))
    model = Decoder(spec)
    seed = draw(st.integers(0, 1000), label="seed")
    init_weights(model, seed)
    [layer] = model.moe_layers()
    shape = draw(st.integers(*batch), label="B"), draw(st.integers(1, 5), label="T"), WIDTH
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert spec.moe is not None
    return LayerCase(layer.to(dtype), spec.moe, x.to(dtype))
