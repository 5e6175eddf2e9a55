"""The HTTP routes of vision models: POST /image-classification, /object-detection, /image-segmentation and /routes.

The first three have the formats of Hugging Face's tasks, so `huggingface_hub.InferenceClient` can call them. The body
of such a request is an image file, or JSON with the image (in base64 or as a data URL) and with parameters. /routes
returns the experts that the patches of an image choose, and GET /tasks returns the model's tasks.
"""

import base64
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError

from mhmoe_ray.families.images.routes import RoutesRequest, image_request
from mhmoe_ray.families.vision.serving.answer import (
    AdmittedRequest,
    ClassScore,
    DetectedObject,
    ScoreFunction,
    TaskImage,
    TaskKind,
    VisionAnswerer,
    kinds_of,
)
from mhmoe_ray.serving.api.access import Client
from mhmoe_ray.serving.api.errors import RequestError
from mhmoe_ray.serving.api.schema import StrictRequest
from mhmoe_ray.serving.api.service import ModelService
from mhmoe_ray.serving.sampling import Text, WholeNumber

DEFAULT_CLASSES = 5
"""Number of classes in the answer to a request without `top_k`, as in transformers' pipelines."""
DEFAULT_THRESHOLD = 0.5
"""Lowest score of the objects in the answer to a request without `threshold`."""
VisionService = ModelService[VisionAnswerer]


class ClassificationParameters(StrictRequest):
    """Parameters of a request to /image-classification."""

    top_k: WholeNumber = Field(DEFAULT_CLASSES, ge=1)
    function_to_apply: ScoreFunction = "softmax"


class DetectionParameters(StrictRequest):
    """Parameters of a request to /object-detection."""

    threshold: float = Field(default=DEFAULT_THRESHOLD, ge=0, le=1)


class SegmentationParameters(DetectionParameters):
    """Parameters of a request to /image-segmentation."""

    mask_threshold: float = Field(default=0.5, ge=0, le=1)
    """Lowest probability at which a pixel belongs to a mask."""
    subtask: Literal["instance", "panoptic", "semantic"] = "instance"


Parameters = TypeVar("Parameters", bound=StrictRequest)


class ImageInput(StrictRequest, Generic[Parameters]):
    """An image with parameters, as Hugging Face's clients send it."""

    inputs: Text
    """The image in base64, or as a data URL."""
    parameters: Parameters | None = None


class BoundingBox(BaseModel):
    """Box around an object, in pixels of the image."""

    xmin: int
    ymin: int
    xmax: int
    ymax: int


class ObjectBox(BaseModel):
    """Object that the model detected, with its class, score and box."""

    label: str
    score: float
    box: BoundingBox


class ObjectMask(BaseModel):
    """Object that the model detected, with its class, score and mask."""

    label: str
    score: float
    mask: str
    """PNG file in base64, in the size of the image, white where the object is."""


class TaskRoutesRequest(RoutesRequest):
    """A request for the experts that the patches of an image choose in a task."""

    task: str | None = None


class TaskRoutes(BaseModel):
    """Experts that the sub-tokens of an image's patches choose in a task, in each layer with experts."""

    model: str
    task: str
    patches_per_side: int
    experts: int
    top_k: int
    """Number of experts that each sub-token chooses in this task."""
    square: tuple[int, int, int, int]
    """Left, top, right and bottom edge of the square that the patches cover, in pixels of the image."""
    routes: list[list[list[list[int]]]]
    """Indexes of the chosen experts by layer, patch (row by row) and head, the preferred ones first."""


class TaskInfo(BaseModel):
    """A task that the vision model was trained for, with the names of its classes."""

    name: str
    kinds: list[TaskKind]
    """Kinds of requests that the task answers, which are also the names of the HTTP routes for these requests."""
    image_size: int
    """Height and width in pixels of an image, as the model reads it."""
    patches_per_side: int
    top_k: int
    """Number of experts that each sub-token chooses in this task; 0 for a model without experts."""
    classes: list[str]


class TaskList(BaseModel):
    """Tasks of the vision model, in the order of its spec."""

    tasks: list[TaskInfo]


def vision_router(service: VisionService) -> APIRouter:
    """Return the FastAPI router with the HTTP routes of a vision model."""
    routes, answerer = APIRouter(), service.answerer
    authenticated_client = Annotated[Client, Depends(service.access.authenticate)]

    @routes.get("/tasks", dependencies=[Depends(service.access.authenticate)])
    async def tasks() -> TaskList:
        """Return the tasks of the model, with the names of their classes."""
        return TaskList(tasks=[_task_info(answerer, name) for name in answerer.vision.tasks])

    @routes.post("/image-classification", openapi_extra=_body_description(ClassificationParameters))
    async def image_classification(
        http_request: Request, client: authenticated_client, task: str | None = None
    ) -> list[ClassScore]:
        """Return the classes of an image with their scores, best first."""
        source, parameters = await _read_body(http_request, ClassificationParameters)
        name = _choose_task(answerer, task, "image-classification")
        async with _image_request(service, client, source) as request:
            output = await answerer.compute(request, name, await answerer.read(name, source))
        return answerer.scores(name, output, parameters.function_to_apply, parameters.top_k)

    @routes.post("/object-detection", openapi_extra=_body_description(DetectionParameters))
    async def object_detection(
        http_request: Request, client: authenticated_client, task: str | None = None
    ) -> list[ObjectBox]:
        """Return the objects in an image with their boxes, the most certain ones first."""
        source, parameters = await _read_body(http_request, DetectionParameters)
        name = _choose_task(answerer, task, "object-detection")
        async with _image_request(service, client, source) as request:
            _, objects = await _detect(answerer, request, name, source, parameters.threshold)
        return [
            ObjectBox(
                label=detected.label,
                score=detected.score,
                box=BoundingBox(**dict(zip(("xmin", "ymin", "xmax", "ymax"), detected.box, strict=True))),
            )
            for detected in objects
        ]

    @routes.post("/image-segmentation", openapi_extra=_body_description(SegmentationParameters))
    async def image_segmentation(
        http_request: Request, client: authenticated_client, task: str | None = None
    ) -> list[ObjectMask]:
        """Return the objects in an image with their masks, the most certain ones first."""
        source, parameters = await _read_body(http_request, SegmentationParameters)
        if parameters.subtask != "instance":
            message = f"'parameters.subtask' is {parameters.subtask}, and this server has instance segmentation alone"
            raise RequestError(400, message, "parameters.subtask")
        name = _choose_task(answerer, task, "image-segmentation")
        async with _image_request(service, client, source) as request:
            image, objects = await _detect(answerer, request, name, source, parameters.threshold)
            masks = [await answerer.draw_mask(detected, image, parameters.mask_threshold) for detected in objects]
        return [
            ObjectMask(label=detected.label, score=detected.score, mask=base64.b64encode(mask).decode())
            for detected, mask in zip(objects, masks, strict=True)
        ]

    @routes.post("/routes")
    async def image_routes(request: TaskRoutesRequest, client: authenticated_client) -> TaskRoutes:
        """Return the experts that an image's patches choose in a task."""
        service.check_model(request.model)
        name = _choose_task(answerer, request.task, None)
        async with image_request(service, client, "image") as admitted_request:
            image = await answerer.read(name, request.image)
            output = await answerer.compute(admitted_request, name, image, has_routes=True)
        return TaskRoutes(
            model=service.model,
            task=name,
            patches_per_side=answerer.vision.patches_per_side(answerer.vision.tasks[name]),
            experts=answerer.details.experts,
            top_k=answerer.engine.top_k[name],
            square=answerer.square(name, image),
            routes=[] if output.expert_LPHK is None else output.expert_LPHK.tolist(),
        )

    return routes


def _image_request(
    service: VisionService, client: Client, source: bytes | str
) -> AbstractAsyncContextManager[AdmittedRequest]:
    """Return the context of a request; a text is the field `inputs` of a JSON body, and bytes are the whole body."""
    return image_request(service, client, "inputs" if isinstance(source, str) else None)


async def _detect(
    answerer: VisionAnswerer, request: AdmittedRequest, task: str, source: bytes | str, threshold: float
) -> tuple[TaskImage, list[DetectedObject]]:
    image = await answerer.read(task, source)
    output = await answerer.compute(request, task, image)
    return image, answerer.objects(task, output, image, threshold)


def _task_info(answerer: VisionAnswerer, name: str) -> TaskInfo:
    task = answerer.vision.tasks[name]
    return TaskInfo(
        name=name,
        kinds=kinds_of(task),
        image_size=task.image_size,
        patches_per_side=answerer.vision.patches_per_side(task),
        top_k=answerer.engine.top_k[name],
        classes=list(answerer.class_names[name]),
    )


def _choose_task(answerer: VisionAnswerer, name: str | None, kind: TaskKind | None) -> str:
    """Return the named task, or the first that answers requests of a kind; a task that is missing is a RequestError."""
    kinds = {task: kinds_of(spec) for task, spec in answerer.vision.tasks.items()}
    names = [task for task in kinds if kind is None or kind in kinds[task]]
    if name is None and names:
        return names[0]
    if name is not None and name in names:
        return name
    subject = f"task for {kind}" if name is None else f"task {name!r}" + (f" for {kind}" if kind else "")
    available_tasks = ", ".join(f"{task} ({' and '.join(kinds[task])})" for task in kinds)
    raise RequestError(404, f"there is no {subject} here; this model has {available_tasks}", "task", "task_not_found")


async def _read_body(http_request: Request, parameters: type[Parameters]) -> tuple[bytes | str, Parameters]:
    """Return a request's image (a file's bytes, or text in base64 or as a data URL) and its parameters.

    An empty body or one of another type is a RequestError, and JSON that does not fit is a RequestValidationError.
    """
    content_type = http_request.headers.get("content-type", "").partition(";")[0].strip().lower()
    content = await http_request.body()
    if content_type == "application/json":
        try:
            body = ImageInput[parameters].model_validate_json(content)  # type: ignore[valid-type]  # made at run time
        except ValidationError as e:
            # The handler of these errors reports the second element of `loc` as the name of the wrong field, so that
            # element gets the whole path of the field.
            paths = [".".join(map(str, error["loc"])) for error in e.errors()]
            errors = [
                {**error, "loc": ("body", path)[: 1 + bool(path)]}
                for error, path in zip(e.errors(), paths, strict=True)
            ]
            raise RequestValidationError(errors) from e
        return body.inputs, body.parameters or parameters()
    # Hugging Face's client sends no Content-Type if it gets the image as bytes.
    if content_type not in ("", "application/octet-stream") and not content_type.startswith("image/"):
        message = f"a body of type {content_type} is no image: send Content-Type: image/jpeg, or JSON"
        raise RequestError(415, message, code="unsupported_media_type")
    if not content:
        raise RequestError(400, "the body is empty: send an image file", code="invalid_image")
    return content, parameters()


def _body_description(parameters: type[StrictRequest]) -> dict[str, Any]:
    file_schema = {"schema": {"type": "string", "format": "binary"}}
    json_schema = {
        "type": "object",
        "properties": {"inputs": {"type": "string"}, "parameters": parameters.model_json_schema()},
        "required": ["inputs"],
        "additionalProperties": False,
    }
    content = {"image/*": file_schema, "application/octet-stream": file_schema}
    return {"requestBody": {"required": True, "content": {**content, "application/json": {"schema": json_schema}}}}
