"""Answers of a vision model to images: the engine's outputs as named classes, and as objects in pixels of the image."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel

from mhmoe_ray.families.images.crops import centre_crop, crop_pixels
from mhmoe_ray.families.images.image_urls import ImageThread, read_image_file, read_image_text
from mhmoe_ray.families.vision.data.fit import Fit, fit_pixels, stored_boxes, stored_probabilities
from mhmoe_ray.families.vision.serving.request import VisionOutput, VisionRequest
from mhmoe_ray.serving.answer import ModelDetails, ServedModel
from mhmoe_ray.serving.engine.round_engine import ClientRequest
from mhmoe_ray.spec import TaskSpec, VisionSpec

if TYPE_CHECKING:
    from mhmoe_ray.families.vision.serving.engine import VisionEngine

AdmittedRequest = ClientRequest[VisionRequest, VisionOutput]
TaskKind = Literal["image-classification", "object-detection", "image-segmentation"]
"""Kind of request that a task of the model can answer, under the name that Hugging Face has for it."""
ScoreFunction = Literal["softmax", "sigmoid", "none"]
"""Function that turns the logits of classes into scores."""


def kinds_of(task: TaskSpec) -> list[TaskKind]:
    """Return the kinds of requests that a task of the model can answer."""
    if task.detector is None:
        return ["image-classification"]
    return ["object-detection", "image-segmentation"] if task.detector.masks else ["object-detection"]


class TaskImage(NamedTuple):
    """Image of a request: its pixels as a task reads them, and its original size."""

    pixels: np.ndarray
    """Pixels, uint8 (size, size, 3)."""
    width: int
    """Width of the original image in pixels."""
    height: int

    @property
    def fit(self) -> Fit:
        """Place of the image in the square that a detector reads."""
        return Fit.of_image(self.width, self.height, len(self.pixels))


class ClassScore(BaseModel):
    """Class of an image, with the score that the model gives it."""

    label: str
    score: float


class BoxMask(NamedTuple):
    """Mask of an object: a grid of probabilities in its box, in the square image that the model reads."""

    probability_YX: np.ndarray
    box_4: np.ndarray
    """Left, top, right and bottom edge of the box, in pixels of the square image that the model reads."""


class DetectedObject(NamedTuple):
    """Object that the model detected in an image."""

    label: str
    score: float
    box: tuple[int, int, int, int]
    """Left, top, right and bottom edge of the object, in pixels of the original image."""
    mask: BoxMask | None
    """Mask of the object; None if the detector has no masks."""


class VisionAnswerer(ServedModel):
    """Served vision model: its engine, and each task's class names in the order of the model's outputs."""

    kind = "vision"
    engine: "VisionEngine"

    def __init__(
        self,
        engine: "VisionEngine",
        details: ModelDetails,
        vision: VisionSpec,
        class_names: Mapping[str, Sequence[str]],
    ) -> None:
        super().__init__(engine, details)
        self.vision, self.class_names = vision, class_names
        # Masks are drawn in a thread of their own: the masks of one image take longer than decoding an image, and
        # images of other requests must be decoded meanwhile.
        self._image_thread, self._mask_thread = ImageThread(), ImageThread()

    async def read(self, task: str, source: bytes | str) -> TaskImage:
        """Return an image (a file, base64 or a data URL) as a task reads it; an unusable one is a RefusedImageError."""
        return await self._image_thread.run(_read_image, source, self.vision.tasks[task])

    async def compute(
        self, request: AdmittedRequest, task: str, image: TaskImage, *, has_routes: bool = False
    ) -> VisionOutput:
        """Return the model's outputs for an image; an engine that is broken or closed raises an EngineError."""
        [output] = await self.engine.answer(request, [VisionRequest(task, image.pixels, has_routes)])
        return output

    def scores(self, task: str, output: VisionOutput, function: ScoreFunction, top_k: int) -> list[ClassScore]:
        """Return the `top_k` classes of an image with the best scores, best first."""
        assert output.logits_C is not None
        score_C = _FUNCTIONS[function](output.logits_C.astype(np.float64))
        # The model may have more outputs than the data has classes, and the rest have no names.
        names = self.class_names[task]
        order = np.argsort(-score_C[: len(names)], kind="stable")[:top_k]
        return [ClassScore(label=names[number], score=float(score_C[number])) for number in order]

    def objects(self, task: str, output: VisionOutput, image: TaskImage, threshold: float) -> list[DetectedObject]:
        """Return the objects in an image with at least the score `threshold`, the most certain ones first."""
        detected, names = output.objects, self.class_names[task]
        assert detected is not None
        box_O4 = stored_boxes(detected.box_O4, image.width, image.height, image.fit)
        # A box in the padding beside the image has no area after it was clipped to the image. The model may have more
        # outputs than the data has classes, and the rest have no names.
        has_area_O = (box_O4[:, 2:] > box_O4[:, :2]).all(1)
        is_answer_O = has_area_O & (detected.score_O >= threshold) & (detected.class_O < len(names))
        has_masks = len(detected.box_mask_OYX) > 0
        return [
            DetectedObject(
                label=names[detected.class_O[number]],
                score=float(detected.score_O[number]),
                box=tuple(box_O4[number].round().astype(int).tolist()),
                mask=BoxMask(detected.box_mask_OYX[number], detected.box_O4[number]) if has_masks else None,
            )
            for number in np.flatnonzero(is_answer_O)
        ]

    async def draw_mask(self, detected: DetectedObject, image: TaskImage, threshold: float) -> bytes:
        """Return an object's mask as a PNG file in the size of the image, white from the probability `threshold` on."""
        assert detected.mask is not None
        return await self._mask_thread.run(_draw_mask, detected.mask, image, threshold)

    def square(self, task: str, image: TaskImage) -> tuple[int, int, int, int]:
        """Return the square that the model reads for a task: left, top, right and bottom edge in pixels of the image.

        A detector's square is padded at the right or the bottom, so it may be larger than the image.
        """
        if self.vision.tasks[task].detector is None:
            return centre_crop(image.width, image.height).box
        side = max(image.width, image.height)
        return 0, 0, side, side


def _read_image(source: bytes | str, task: TaskSpec) -> TaskImage:
    image = read_image_file(source) if isinstance(source, bytes) else read_image_text(source)
    # Evaluation reads images in the same way (`families.vision.data.samples.TaskSampleMaker`).
    pixels = crop_pixels(image, task.image_size) if task.detector is None else fit_pixels(image, task.image_size)
    return TaskImage(pixels, *image.size)


def _draw_mask(mask: BoxMask, image: TaskImage, threshold: float) -> bytes:
    # The import is here because a process that only checks whether a model can be served needs no torch.
    import torch
    from PIL import Image

    from mhmoe_ray.families.vision.model import paste_mask

    # torch keeps this number for each calling thread. More threads would slow down those of the engine.
    torch.set_num_threads(1)
    probability_YX, box_4 = (torch.from_numpy(values) for values in mask)
    mask_YX = paste_mask(probability_YX, box_4, len(image.pixels)).numpy()
    is_object_YX = stored_probabilities(mask_YX, image.width, image.height, image.fit) >= threshold
    sink = io.BytesIO()
    Image.fromarray(is_object_YX.astype(np.uint8) * 255).save(sink, "PNG")
    return sink.getvalue()


def _softmax(logits_C: np.ndarray) -> np.ndarray:
    weight_C = np.exp(logits_C - logits_C.max())
    probability_C: np.ndarray = weight_C / weight_C.sum()
    return probability_C


def _sigmoid(logits_C: np.ndarray) -> np.ndarray:
    # tanh does not overflow, as the exponential function would.
    probability_C: np.ndarray = 0.5 * (1 + np.tanh(logits_C / 2))
    return probability_C


_FUNCTIONS: dict[ScoreFunction, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "none": lambda logits_C: logits_C,
}
