"""Small vision models for tests: a run with a checkpoint of random weights, and images with their annotations."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mhmoe_ray.checkpoint.manifest import checkpoint_name
from mhmoe_ray.families.vision.model import Vision
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run
from mhmoe_ray.spec import RunSpec
from tests.support.saved import commit_checkpoint, save_tensors

CLASSES = {
    "animals": ["bear", "cat", "dog", "fox"],
    "weather": ["rain", "sun"],
    "things": ["cup", "hat", "key"],
    "marks": ["cross", "dot"],
}
"""Names of the classes of each task. Task `animals` has one more output than names."""
DETECTOR: dict[str, Any] = {
    "scales": [1],
    "width": 8,
    "anchor_sizes": [2, 3],
    "candidates": 30,
    "proposals": 12,
    "box_samples": 8,
    "d_box": 16,
    "mask_layers": 1,
    "score_threshold": 0.01,
    "max_objects": 8,
}
VISION: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "backbone": "subln",
        "vision": {
            "patch_size": 4,
            "tasks": {
                "animals": {"image_size": 16, "classes": 5},
                "weather": {"image_size": 24, "classes": 2},
                "things": {"image_size": 32, "classes": 3, "detector": DETECTOR},
                "marks": {"image_size": 16, "classes": 2, "detector": {**DETECTOR, "masks": False}},
            },
        },
        "d_model": 32,
        "layers": 2,
        "attention_heads": 2,
        "moe": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24, "every": 1},
    },
    "data": {
        "prepared": "/nowhere/prepared",
        "sources": {
            name: {
                "path": f"/nowhere/{name}",
                "format": "images" if name in ("animals", "weather") else "coco",
                "columns": ["image", "class" if name in ("animals", "weather") else "objects"],
            }
            for name in CLASSES
        },
        "parts": {name: {"sources": [name], "micro_batch_size": 1} for name in CLASSES},
    },
    "train": {"steps": 20, "micro_batches": 1, "micro_batch_size": 4},
}


def vision_spec(folder: Path, tasks: tuple[str, ...] = tuple(CLASSES)) -> RunSpec:
    """Return a spec of a vision model with some of the tasks of `CLASSES`, whose runs are below a folder."""
    tree = json.loads(json.dumps(VISION)) | {"storage": str(folder / "runs")}
    for section in (tree["model"]["vision"]["tasks"], tree["data"]["sources"], tree["data"]["parts"]):
        for name in set(section) - set(tasks):
            del section[name]
    tree["train"]["micro_batch_size"] = len(tasks)
    return RunSpec.model_validate(tree)


def make_vision_run(folder: Path, tasks: tuple[str, ...] = tuple(CLASSES)) -> tuple[RunDir, Vision]:
    """Return a run with a checkpoint of a vision model with random weights, and the model.

    The first task routes each sub-token to one expert, as if its top-k had been adapted, and the other tasks to two.
    """
    spec = vision_spec(folder, tasks)
    run = create_run(spec)
    add_attempt(run, Attempt("job-1", "http://127.0.0.1:9", local=True))
    run.classes_file.write_text(json.dumps({name: CLASSES[name] for name in tasks}))
    model = build_model(spec.model).eval().requires_grad_(False)
    assert isinstance(model, Vision)
    init_weights(model, 3)
    for name, parameter in model.named_parameters():
        # Initial weights give all classes about the same score, so weights of outputs are enlarged. Weights of box
        # offsets are reduced, which keeps boxes near their anchors.
        if name.startswith("outputs.") and parameter.dim() > 1:
            parameter.mul_(0.1 if "bbox_pred" in name else 4)
        if name.endswith(".cls_score.bias"):
            # Random weights may take every region for background, which is class 0.
            parameter[0] -= 10
        if name.endswith(".mask_fcn_logits.bias"):
            # Random weights may take no cell of a mask for its object.
            parameter += 2
    top_k = [1, *[2] * (len(tasks) - 1)]
    model.set_top_k(top_k)
    objective = {"tasks": {name: {"top_k": k} for name, k in zip(tasks, top_k, strict=True)}}
    checkpoint = run.checkpoints / checkpoint_name(1, 1)
    checkpoint.mkdir()
    save_tensors(checkpoint / "weights", model.named_tensors())
    commit_checkpoint(checkpoint, spec.model, seed=3, seq_len=0, objective=objective)
    return run, model


def random_pixels(seed: int, height: int, width: int) -> np.ndarray:
    """Return the pixels of an image with coarse random patterns, (height, width, 3) uint8."""
    tiles = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    rows, columns = np.arange(height) * 5 // height, np.arange(width) * 5 // width
    return tiles[rows][:, columns]
