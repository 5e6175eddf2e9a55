"""Tests that parameters and multiply-adds computed from a spec are those of a built model, for each architecture."""

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_ray.architectures import ARCHITECTURES
from mhmoe_ray.checkpoint.huggingface.names import tensor_entries
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.router import SCORES_BY_ROUTER
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.model.drawn import specs
from tests.support.decoders import BACKBONES

MOES = [
    None,
    MoESpec(heads=1, experts=3, top_k=1, d_expert=10),
    MoESpec(heads=2, experts=4, top_k=2, d_expert=24, every=1, router="xmoe", d_shared=20),
    MoESpec(heads=4, experts=6, top_k=3, d_expert=5, every=3, router="xmoe_torchscale", projection_layers=3),
    MoESpec(heads=1, experts=6, top_k=3, d_expert=5, merge_projection=True, projection_layers=2),
    MoESpec(heads=2, experts=6, top_k=3, d_expert=5, head_projection=False, router="xmoe", router_dim=7),
    MoESpec(experts=6, top_k=3, d_expert=5, every=1, dense_first=2, scoring="sigmoid", groups=2, top_groups=1),
    *(MoESpec(heads=4, experts=8, top_k=2, d_expert=5, router=router) for router in SCORES_BY_ROUTER),
    MoESpec(heads=2, experts=3, top_k=1, d_expert=5, router="domain", domains=["a", "b", "c"]),
    MoESpec(heads=2, experts=4, top_k=2, d_expert=24, d_sub_token=48),
    MoESpec(heads=5, experts=6, top_k=3, d_expert=5, d_sub_token=7, projection_layers=3, d_shared=4),
]
TRUNK_OPTIONS = [
    {"d_head": 6, "kv_heads": 4},
    {"attention_bias": "qkv", "qk_norm": "head"},
    {"attention_bias": "all", "qk_norm": "all", "kv_heads": 4, "d_head": 2},
]
SIZES = {"vocab_size": 1000, "d_model": 48, "layers": 6, "attention_heads": 12}


def model_specs(backbone, moe):
    """Yield specs with tied and with untied embeddings, and with each option that the architecture has.

    Options are grouped queries and those of `TRUNK_OPTIONS`.
    """
    d_ff = None if moe and moe.every == 1 and not moe.dense_first else 100
    for kv_heads in (None, 4) if ARCHITECTURES[backbone].grouped_queries else (None,):
        for has_tied_embeddings in (True, False):
            yield ModelSpec(
                backbone=backbone, **SIZES, d_ff=d_ff, moe=moe, kv_heads=kv_heads, tied_embeddings=has_tied_embeddings
            )
    if ARCHITECTURES[backbone].has_trunk_options:
        for options in TRUNK_OPTIONS:
            yield ModelSpec(backbone=backbone, **SIZES, d_ff=d_ff, moe=moe, **options)


@pytest.mark.parametrize("moe", MOES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_parameters_from_the_spec_are_those_of_a_built_model(backbone, moe):
    for spec in model_specs(backbone, moe):
        model = Decoder(spec)
        assert compute_sizes(spec).parameters == sum(p.numel() for p in model.parameters())
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        assert compute_sizes(spec).expert_parameters == experts


def flops_without_attention(model):
    """Return the FLOPs of a forward pass of 8 tokens, as torch counts them, without those of attention scores."""
    init_weights(model, 0)
    tokens = torch.arange(8)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    operations = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    return sum(flops for name, flops in operations.items() if "attention" not in name)


@settings(max_examples=40)
@given(spec=specs(router="linear", kernel="grouped", capacity_factor=None))
def test_counts_of_random_layers_are_those_of_a_built_model(spec):
    """The numbers of parameters and multiply-adds are exact for any heads, widths of sub-tokens and projections."""
    sizes, model = compute_sizes(spec), Decoder(spec)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.macs_per_token * 2 * 8 == flops_without_attention(model)


@pytest.mark.parametrize(
    "moe",
    [
        None,
        MoESpec(heads=4, experts=6, top_k=3, d_expert=12, d_shared=20, kernel="grouped"),
        MoESpec(heads=3, experts=6, top_k=2, d_expert=12, d_sub_token=30, projection_layers=2, kernel="grouped"),
    ],
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_multiply_adds_from_the_spec_are_those_that_torch_counts(backbone, moe):
    for spec in model_specs(backbone, moe):
        assert flops_without_attention(Decoder(spec)) == 2 * 8 * compute_sizes(spec).macs_per_token


@pytest.mark.parametrize("backbone", ARCHITECTURES)
def test_an_expert_has_the_parameters_that_its_architecture_counts(backbone):
    vision = {"patch_size": 4, "tasks": {"a": {"image_size": 8, "classes": 2}}}
    spec = ModelSpec(backbone=backbone, vision=vision, **SIZES | {"vocab_size": 0}, d_ff=100)
    shapes = modules_of(spec).expert_shapes(7, 11)
    assert sum(torch.empty(shape).numel() for shape in shapes.values()) == spec.architecture.expert_parameters(7, 11)
    assert sum(len(shape) == 2 for shape in shapes.values()) == spec.architecture.expert_matrices
    assert modules_of(spec).function(spec).name == spec.architecture.expert_function


@pytest.mark.parametrize("moe", MOES[:3])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_export_has_an_entry_for_every_tensor_of_the_model(backbone, moe):
    for spec in model_specs(backbone, moe):
        exported = {entry.checkpoint_name for group in tensor_entries(spec) for entry in group}
        assert exported == set(Decoder(spec).named_tensors())
