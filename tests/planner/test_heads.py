"""Tests of the planned parameters and memory of vision models, against built models."""

import pytest
import torch

from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.sizes import block_sizes, compute_sizes
from tests.support.tensors import SavedTensors
from tests.support.visions import vision_batch, vision_spec

DETECTOR = "model__vision__tasks__detect__detector"
SPECS = {
    "task-routers": {},
    "one-router": {"model__vision__routers": "shared"},
    "dense": {"model__moe": None},
    "convolutions": {"model__vision__stem": "convolutions"},
    "llama": {"model__backbone": "llama"},
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
        CLASSIFIER,
        {**CLASSIFIER, "model__vision__stem": "convolutions"},
        {**CLASSIFIER, "model__vision__adaptive": {"largest": 4}, "model__moe__top_k": 1},
    ],
    ids=["detector", "no-masks", "dense", "linear-stem", "convolutions", "adaptive"],
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
