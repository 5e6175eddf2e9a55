"""Tests of the planned parameters and memory of vision models, against built models."""

import pytest
import torch

from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.sizes import block_sizes, compute_sizes
from tests.support.tensors import SavedTensors
from tests.support.visions import VIT, vision_batch, vision_spec

DETECTOR = "model__vision__tasks__detect__detector"
SPECS = {
    "task-routers": {},
    "one-router": {"model__vision__routers": "shared"},
    "dense": {"model__moe": None},
    "convolutions": {"model__vision__stem": "convolutions"},
    "llama": {"model__backbone": "llama"},
    "vit": VIT,
    "every-scale": {f"{DETECTOR}__scales": [4, 2, 1, 0.5], f"{DETECTOR}__mask_layers": 3},
    "no-masks": {f"{DETECTOR}__masks": False, f"{DETECTOR}__anchor_sizes": [3, 4, 5]},
    "x-moe": {"model__moe__router": "xmoe", "model__moe__heads": 1},
}


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_planned_parameters_equal_those_of_a_built_model(changes):
    spec = vision_spec(**changes)
    with torch.device("meta"):
        model = build_model(spec.model)
    count = sum(p.numel() for p in model.parameters())
    assert compute_sizes(spec.model).parameters == count
    blocks = block_sizes(spec.model)
    experts = compute_sizes(spec.model).expert_parameters
    mixtures = spec.model.moe_layers
    dense = (spec.model.layers - mixtures) * blocks.dense + mixtures * blocks.mixture
    assert dense + blocks.outside + experts == count


@pytest.mark.parametrize(
    ("d_model", "attention_heads", "published"), [(192, 3, 5_717_416), (384, 6, 22_050_664), (768, 12, 86_567_656)]
)
def test_vision_transformers_have_the_published_numbers_of_parameters(d_model, attention_heads, published):
    """ViT-Ti/16, S/16 and B/16 with 224 pixels and 1,000 classes, as in timm."""
    task = {"image_size": 224, "classes": 1000, "pooling": "class_token"}
    sizes = {"d_model": d_model, "layers": 12, "attention_heads": attention_heads, "d_ff": 4 * d_model, "moe": None}
    vision = {"patch_size": 16, "tasks": {"classify": task}}
    model = {f"model__{key}": value for key, value in {**sizes, "backbone": "vit", "vision": vision}.items()}
    spec = vision_spec(data__sources=CLASSIFIER["data__sources"], data__parts=CLASSIFIER["data__parts"], **model)
    with torch.device("meta"):
        built_model = build_model(spec.model)
    assert compute_sizes(spec.model).parameters == sum(p.numel() for p in built_model.parameters()) == published


# In classifiers like these, the stem and the routing need most of the memory.
CLASSIFIER = {
    "data__parts": {"classify": {"sources": ["drawings"], "micro_batch_size": 5}},
    "data__sources": {"drawings": {"path": "/nowhere/drawings", "format": "images", "columns": ["image", "class"]}},
    "model__vision__tasks": {"classify": {"image_size": 64, "classes": 5}},
    "model__vision__patch_size": 8,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {f"{DETECTOR}__masks": False},
        {"model__moe": None},
        VIT,
        CLASSIFIER,
        {**CLASSIFIER, "model__vision__stem": "convolutions"},
        {**CLASSIFIER, "model__vision__adaptive": {"largest": 4}, "model__moe__top_k": 1},
    ],
    ids=["detector", "no-masks", "dense", "vit", "linear-stem", "convolutions", "adaptive"],
)
def test_planned_activations_are_near_the_bytes_that_autograd_saves(changes):
    """The numbers of proposals and of objects vary, so the plan of a detector is approximate."""
    spec = vision_spec(**changes)
    model = build_model(spec.computed_model)
    init_weights(model, 0)
    if spec.model.vision.adaptive is not None:
        model.set_top_k([spec.model.vision.adaptive.largest] * len(model.tasks))
    saved_tensors = SavedTensors(model)
    with torch.autograd.graph.saved_tensors_hooks(saved_tensors, lambda t: t):
        model(vision_batch(spec), noise=Noise(0, 0))
    assert compute_memory(spec).activations == pytest.approx(saved_tensors.bytes, rel=0.25)
