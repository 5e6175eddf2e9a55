"""Small vision models for tests, and samples for them."""

from typing import Any

import numpy as np
import torch

from mhmoe_ray.families.vision.data.batches import task_batch
from mhmoe_ray.families.vision.data.columns import ImageObjects, TaskSamples, VisionSamples
from mhmoe_ray.families.vision.model import VisionBatch
from mhmoe_ray.spec import MicroBatchPart, RunSpec
from tests.support.specs import with_changes

VISION: dict[str, Any] = {
    "name": "tiny",
    "storage": "/nowhere/runs",
    "model": {
        "backbone": "subln",
        "vision": {
            "patch_size": 4,
            "tasks": {
                "classify": {"image_size": 16, "classes": 5},
                "detect": {
                    "image_size": 32,
                    "classes": 3,
                    "detector": {
                        "scales": [2, 1],
                        "width": 16,
                        "anchor_samples": 32,
                        "candidates": 24,
                        "proposals": 16,
                        "box_samples": 8,
                        "d_box": 24,
                    },
                },
            },
        },
        "d_model": 32,
        "layers": 2,
        "attention_heads": 2,
        "d_ff": 48,
        "moe": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24, "every": 2},
    },
    "data": {
        "prepared": "/nowhere/prepared",
        "sources": {
            "drawings": {"path": "/nowhere/drawings", "format": "images", "columns": ["image", "class"]},
            "scenes": {"path": "/nowhere/scenes", "format": "coco", "columns": ["image", "objects"]},
        },
        "parts": {
            "classify": {"sources": ["drawings"], "micro_batch_size": 3},
            "detect": {"sources": ["scenes"], "micro_batch_size": 2, "weight": 0.5},
        },
    },
    "train": {"steps": 20, "micro_batches": 4, "micro_batch_size": 5, "lr": 3e-3, "warmup_steps": 2},
}


def vision_spec(**changes: Any) -> RunSpec:
    """Return the spec `VISION` with changed values, whose keys have `__` for the dots of a path."""
    return RunSpec.model_validate(with_changes(VISION, changes))


VIT = {
    "model__backbone": "vit",
    "model__vision__tasks__classify__pooling": "class_token",
    "model__vision__tasks__classify__rate_ratio": 2,
}
"""Changes to AdaMV-MoE's trunk, with a class token and a ratio of learning rates."""


def task_samples(spec: RunSpec, part: MicroBatchPart, seed: int) -> TaskSamples:
    """Return samples of one task with random images, classes and objects, all of which depend on the seed."""
    rng, vision = np.random.default_rng(seed), spec.model.vision
    assert vision is not None
    task = vision.tasks[part.name]
    size = task.image_size
    images = rng.integers(0, 256, (part.samples, size, size, 3), np.uint8)
    if task.detector is None:
        return TaskSamples(images, rng.integers(0, task.classes, part.samples))
    # Some images have no objects.
    objects = [image_objects(rng, int(rng.integers(0, 4)), size, task.classes) for _ in range(part.samples)]
    return TaskSamples(images, None, objects)


def image_objects(rng: np.random.Generator, count: int, size: int, classes: int) -> ImageObjects:
    """Return random objects, whose masks are ellipses in their boxes."""
    edges = np.sort(rng.integers(0, size - 8, (count, 2)), axis=1)
    sides = rng.integers(8, 17, (count, 2))
    corners = np.minimum(edges + sides, size)
    boxes = np.concatenate([edges, corners], 1).astype(np.float32).reshape(-1, 4)
    y, x = np.mgrid[:size, :size] + 0.5
    masks = np.zeros((count, size, size), bool)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        masks[number] = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
    return ImageObjects(boxes, rng.integers(0, classes, count), masks)


def micro_batch_samples(spec: RunSpec, micro_batch: int) -> VisionSamples:
    """Return the samples of all tasks of a micro-batch."""
    return {part.name: task_samples(spec, part, 100 * micro_batch + number) for number, part in enumerate(spec.parts)}


def vision_batch(spec: RunSpec, micro_batch: int = 0) -> VisionBatch:
    """Return a micro-batch for the model, on the CPU."""
    samples = micro_batch_samples(spec, micro_batch)
    return tuple(task_batch(samples[part.name], torch.device("cpu")) for part in spec.parts)
