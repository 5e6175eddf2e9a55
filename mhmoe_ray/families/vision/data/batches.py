"""Micro-batches of a vision model: from samples in CPU memory to the tensors that the model takes."""

import numpy as np
import torch

from mhmoe_ray.families.vision.data.columns import TaskSamples
from mhmoe_ray.families.vision.model import Objects, TaskBatch
from mhmoe_ray.model.transfer import copy_to_device


def task_batch(samples: TaskSamples, device: torch.device) -> TaskBatch:
    """Return a micro-batch of one task as tensors on a device, from samples in CPU memory."""
    image_NYXC = copy_to_device(samples.images, device)
    if samples.classes is not None:
        return TaskBatch(image_NYXC, copy_to_device(samples.classes, device))
    objects = [
        Objects(*(copy_to_device(array, device) for array in (boxes, classes, masks.astype(np.uint8))))
        for boxes, classes, masks in samples.objects
    ]
    return TaskBatch(image_NYXC, None, objects)
