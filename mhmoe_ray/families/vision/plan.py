"""Plans of vision models: sizes of stems and heads. Tests compare the numbers with those of a built model."""

from itertools import pairwise
from typing import NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.family import HEADS, PATCHES, FamilyPlan, ModelPart
from mhmoe_ray.spec import DetectorSpec, ModelSpec, RunSpec, TaskSpec, VisionSpec

POOLED_CELLS = 7**2
MASK_CELLS = 14**2
"""Numbers of cells of the feature maps that a detector pools for a region's class and mask (`model/detector.py`)."""


class VisionPlan(FamilyPlan):
    """Plan of vision models, whose tasks share the blocks."""

    is_causal = False
    gathers_outside_in_float32 = True

    def embedding_rows(self, model: ModelSpec) -> int:
        vision = _vision(model)
        # A class token has a position, and an embedding of its own.
        return sum(vision.positions(task) + task.has_class_token for task in vision.tasks.values())

    def input_parts(self, model: ModelSpec) -> list[ModelPart]:
        vision = _vision(model)
        stem = stem_sizes(model, vision)
        return [ModelPart(PATCHES, 1, len(vision.tasks) * stem.parameters, *stem)]

    def output_parts(self, model: ModelSpec) -> list[ModelPart]:
        # A patch uses only the head of its own task, so the active parameters are those of the largest head. Heads
        # compute per image and per object, so their multiply-adds per token are left out.
        heads = [head_parameters(model, task) for task in _vision(model).tasks.values()]
        return [ModelPart(HEADS, 1, sum(heads), max(heads), 0)]

    def routers(self, model: ModelSpec) -> int:
        vision = _vision(model)
        return len(vision.tasks) if vision.routers == "per_task" else 1

    def output_bytes(self, spec: RunSpec, size: int) -> int:
        vision = _vision(spec.model)
        stem = spec.tokens_per_micro_batch * stem_activation_bytes(spec.model, vision)
        return stem + sum(part.samples * head_activation_bytes(vision, vision.tasks[part.name]) for part in spec.parts)

    def loss_bytes(self, spec: RunSpec) -> int:
        return 0  # the losses of heads are small

    def summary(self, spec: RunSpec) -> dict[str, str]:
        vision = _vision(spec.model)
        tasks = [
            f"{name}: images of {task.image_size} x {task.image_size} pixels in {vision.patches(task)} patches, "
            + (f"{task.classes} classes" if task.detector is None else f"objects of {task.classes} classes")
            for name, task in vision.tasks.items()
        ]
        if spec.model.moe is not None:
            router = "one router for all tasks" if vision.routers == "shared" else "a router for each task"
            adaptive = vision.adaptive
            tasks.append(router + (f", which chooses up to {adaptive.largest} experts" if adaptive else ""))
        return {"vision": "\n".join(tasks)}

    def micro_batch(self, spec: RunSpec) -> str:
        return f"{spec.tokens_per_micro_batch:,} patches"


def _vision(model: ModelSpec) -> VisionSpec:
    assert model.vision is not None
    return model.vision


class StemSizes(NamedTuple):
    """Sizes of the stem of one task: the layers from pixels to patches."""

    parameters: int
    macs: int
    """Multiply-adds per patch."""


def stem_sizes(model: ModelSpec, vision: VisionSpec) -> StemSizes:
    """Return the numbers of parameters and multiply-adds of the stem of one task."""
    if vision.stem == "linear":
        projection = vision.patch_values * model.d_model
        return StemSizes(projection + model.d_model, projection)
    widths = vision.stem_widths(model.d_model)
    output = model.d_model**2
    parameters, macs, cells = output + model.d_model, output, vision.patch_size**2
    for channels, width in pairwise(widths):
        cells //= 4
        parameters += 9 * channels * width + 2 * width
        macs += cells * 9 * channels * width
    return StemSizes(parameters, macs)


def stem_activation_bytes(model: ModelSpec, vision: VisionSpec) -> int:
    """Return the number of bytes per patch that the stem, which computes in float32, keeps for the backward."""
    values = vision.patch_values
    if vision.stem == "convolutions":
        cells = vision.patch_size**2
        for width in vision.stem_widths(model.d_model)[1:]:
            cells //= 4
            # For the backward, the norm keeps its input with a mean and a deviation, GELU keeps its input, and the next
            # layer keeps its input.
            values += cells * (3 * width + 2)
    return FLOAT32 * values


def head_parameters(model: ModelSpec, task: TaskSpec) -> int:
    """Return the number of parameters of the head of a task: a classifier, or a detector."""
    if task.detector is None:
        return (model.d_model + 1) * task.classes
    detector, width = task.detector, task.detector.width
    outputs, anchors = task.classes + 1, len(detector.anchor_sizes) * len(detector.anchor_ratios)
    convolution = 9 * width**2 + width
    pyramid = sum(_level_parameters(model.d_model, width, scale) for scale in detector.scales)
    regions = convolution + 5 * (width + 1) * anchors
    boxes = detector.d_box * (width * POOLED_CELLS + detector.d_box + 4) + (detector.d_box + 1) * 5 * outputs
    masks = detector.mask_layers * (convolution + width) + 4 * width**2 + width + (width + 1) * outputs
    return pyramid + regions + boxes + (masks if detector.masks else 0)


def _level_parameters(d_model: int, width: int, scale: float) -> int:
    channels, total = d_model, 0
    for number in range(int(scale) // 2):
        half = channels // 2
        total += 4 * channels * half + half
        total += 2 * half if number == 0 and scale == 4 else 0
        channels = half
    return total + channels * width + 9 * width**2 + 4 * width


def head_activation_bytes(vision: VisionSpec, task: TaskSpec) -> int:
    """Return the approximate number of bytes that the head of a task keeps for the backward, in float32, for one image.

    A detector's numbers of region proposals and of objects vary.
    """
    if task.detector is None:
        return FLOAT32 * 2 * task.classes
    return FLOAT32 * (_map_values(vision, task, task.detector) + _region_values(task, task.detector))


def _map_values(vision: VisionSpec, task: TaskSpec, detector: DetectorSpec) -> int:
    """Return the number of values per image that a detector keeps for the backward of its pyramid and its proposals."""
    cells = sum(int(vision.patches(task) * scale**2) for scale in detector.scales)
    anchors = len(detector.anchor_sizes) * len(detector.anchor_ratios)
    # A level of the pyramid keeps the inputs and outputs of two convolutions and two norms. The network that proposes
    # regions has one more convolution.
    return cells * (7 * detector.width + 8 * anchors)


def _region_values(task: TaskSpec, detector: DetectorSpec) -> int:
    """Return the number of values per image that a detector keeps for the backward of its sampled regions.

    At most half of the regions have masks, and the count assumes a quarter.
    """
    boxes = detector.box_samples * (detector.width * POOLED_CELLS + 5 * detector.d_box)
    if not detector.masks:
        return boxes
    mask_values = MASK_CELLS * (detector.width * (2 * detector.mask_layers + 5) + 4 * 2 * (task.classes + 1))
    return boxes + detector.box_samples // 4 * mask_values
