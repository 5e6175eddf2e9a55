"""The `model.vision` section: a vision transformer, its tasks and their heads, and an adaptive number of experts."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from mhmoe_ray.spec.base import (
    ExpertCount,
    ImageSide,
    LayerCount,
    OptionalStepCount,
    SampleCount,
    Section,
    StepCount,
    TokenCount,
    Width,
)


def _check_scale(scale: float) -> float:
    if scale not in (4, 2, 1, 0.5):
        raise ValueError("a scale is 4, 2, 1 or 0.5")
    return scale


class DetectorSpec(Section):
    """Detector of objects in images (Mask R-CNN, arXiv 1703.06870).

    Heads predict region proposals, boxes with classes, and masks from the maps of a feature pyramid.
    """

    scales: list[Annotated[float, AfterValidator(_check_scale)]] = Field(default=[2, 1, 0.5], min_length=1)
    """Sizes of the maps of the feature pyramid, relative to the map of patches (ViTDet, arXiv 2203.16527): 4, 2, 1 or
    0.5, each half of the one before it."""
    width: Width = 64
    """Number of channels of the feature pyramid."""
    anchor_sizes: list[PositiveFloat] = Field(default=[4, 6], min_length=1)
    """Side lengths of the anchors at each position of a map of the feature pyramid, in cells of that map."""
    anchor_ratios: list[PositiveFloat] = Field(default=[0.5, 1, 2], min_length=1)
    """Ratios of height to width of the anchors."""
    anchor_samples: TokenCount = 256
    """Number of anchors of an image whose losses count; half of them at most contain an object."""
    candidates: TokenCount = 200
    """Number of best anchors of each map that become proposals; overlapping proposals are then removed."""
    proposals: TokenCount = 100
    """Largest number of proposals of an image."""
    box_samples: TokenCount = 64
    """Number of proposals of an image whose losses count; half of them at most contain an object."""
    d_box: Width = 256
    """Hidden width of the head that predicts boxes and classes."""
    pooling_samples: SampleCount = 2
    """Number of sampling points along each side of a cell in the pooling of a region's features (RoIAlign). With 1,
    training is faster on CPUs, where the gradient of this pooling uses a single core."""
    masks: bool = True
    """If true, the detector has a head for masks, and every object in its data must have a mask."""
    mask_layers: LayerCount = 2
    """Number of convolutions in the head that predicts masks."""
    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    """Lowest score of an object that is reported."""
    overlap_threshold: float = Field(default=0.5, gt=0, le=1)
    """Overlap (intersection over union) of two objects of a class above which the less certain one is left out."""
    max_objects: TokenCount = 100
    """Largest number of objects that are reported for an image."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        # torchvision's pooling assumes that the first map is the finest one, and that each next one has half its size.
        if any(fine != 2 * coarse for fine, coarse in pairwise(self.scales)):
            raise ValueError("each of the scales must be half of the one before it, such as 2, 1, 0.5")
        return self


TaskName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


def module_key(task: str) -> str:
    """Return a task's module name, prefixed because a task may be called like a method of torch's modules."""
    return f"task_{task}"


class TaskSpec(Section):
    """Task of a vision model: to classify images, or with a detector to find objects in them."""

    image_size: ImageSide
    """Height and width in pixels of an image as the model reads it. Images to classify are cropped to this size. Images
    for detection are filled up with grey to a square."""
    classes: TokenCount
    """Largest number of classes. The data may have fewer; then no image belongs to the remaining outputs."""
    detector: DetectorSpec | None = None
    """Options that make the task one of detection. By default it is classification."""
    pooling: Literal["mean", "class_token"] = "mean"
    """Output of the last norm from which images are classified: the mean over all patches, or the output for a learned
    class token before the patches, as in ViT."""
    rate_ratio: PositiveFloat = 1.0
    """Ratio of the task's learning rate to train.lr (AdaMV-MoE): a factor of its losses, in addition to
    data.parts.NAME.weight, and of its load balancing losses."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.detector is not None and self.pooling != "mean":
            raise ValueError(f"pooling {self.pooling} is for classification, but the task has a detector: remove it")
        return self

    @property
    def has_class_token(self) -> bool:
        return self.pooling == "class_token"

    @property
    def objective(self) -> Literal["classify", "detect"]:
        return "classify" if self.detector is None else "detect"


class AdaptiveSpec(Section):
    """Adaptive number of experts (AdaMV-MoE, ICCV 2023), where each task of a vision model has its own k.

    Each k is `moe.top_k` at first. The k of a task rises by one if the task's validation loss has not improved for
    `patience` steps. A rise that does not help is taken back.
    """

    largest: ExpertCount
    """Largest number of experts k of a task."""
    interval: StepCount = 2_000
    """Number of steps between two validations for this rule. A validation takes place right before the next step, so
    there is none after the last step of a run."""
    patience: StepCount = 5_000
    """Number of steps without an improvement after which a task's number of experts k changes."""
    batches: StepCount = 11
    """Number of micro-batches of held-out samples per task whose losses are summed in a validation."""
    first_loss: PositiveFloat = 100.0
    """Loss that the first validation of each task is compared with."""
    first_step: OptionalStepCount = 40_000
    """Step from which `patience` is counted until a validation has improved on `first_loss`."""
    rule: Literal["published", "coded"] = "published"
    """Rule that changes the number of experts k. published: each task decides by itself, and takes back a raise that
    did not help, after which its k stays. coded: as in the authors' code, all tasks share the records of whether k was
    raised and of whether k stays, and a task at the largest k does not take its last raise back."""


class VisionSpec(Section):
    """A vision transformer instead of a decoder (ViT, arXiv 2010.11929): all tasks share its blocks and its experts.

    Each task has its own input layer (patches and position embeddings) and its own head.
    """

    patch_size: ImageSide
    """Height and width of a patch in pixels."""
    stem: Literal["linear", "convolutions"] = "linear"
    """Layers that turn pixels into patches. linear: one projection of the pixels of a patch (ViT). convolutions: 3 x 3
    convolutions of stride 2, with which a model learns faster from few images (arXiv 2106.14881); patch_size must be a
    power of 2."""
    tasks: dict[TaskName, TaskSpec] = Field(min_length=1)
    """Tasks by name; each has a part of the same name in data.parts."""
    routers: Literal["shared", "per_task"] = "per_task"
    """Routers of a layer with experts. shared: one for all tasks. per_task: one for each task."""
    adaptive: AdaptiveSpec | None = None
    """Options that make the number of experts adaptive. By default it is moe.top_k for all tasks."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stem == "convolutions" and (self.patch_size == 1 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f"patch_size is {self.patch_size}, but a stem of convolutions needs a power of 2")
        for name, task in self.tasks.items():
            if task.image_size % self.patch_size:
                raise ValueError(
                    f"tasks.{name}.image_size {task.image_size} must be a multiple of patch_size ({self.patch_size})"
                )
            if task.detector is not None and self.patch_size & (self.patch_size - 1):
                raise ValueError(f"patch_size is {self.patch_size}, but a detector needs a power of 2")
            if task.detector is not None and task.detector.scales[0] > self.patch_size:
                raise ValueError(
                    f"tasks.{name}.detector.scales has {task.detector.scales[0]:g}, but a patch of {self.patch_size} "
                    "pixels a side cannot be divided into so many cells: remove this scale, or raise patch_size"
                )
            if task.detector is not None and 0.5 in task.detector.scales and self.patches_per_side(task) % 2:
                raise ValueError(
                    f"tasks.{name} has a map of {self.patches_per_side(task)} patches a side, which cannot be halved: "
                    "remove 0.5 from its detector.scales, or change image_size"
                )
        return self

    def patches_per_side(self, task: TaskSpec) -> int:
        return task.image_size // self.patch_size

    def patches(self, task: TaskSpec) -> int:
        return self.patches_per_side(task) ** 2

    def positions(self, task: TaskSpec) -> int:
        """Return the number of rows that an image of a task has in the blocks: its patches and the class token."""
        return self.patches(task) + task.has_class_token

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2

    def stem_widths(self, d_model: int) -> list[int]:
        """Return the channels between the convolutions of the stem: 3 in the input, then doubling up to d_model."""
        layers = self.patch_size.bit_length() - 1
        return [3, *(max(1, d_model >> (layers - 1 - layer)) for layer in range(layers))]
