"""Evaluation of a vision model: its losses, its accuracy in classification, and its average precision in detection.

pycocotools computes COCO's average precision, in the pixels of the stored images. The baseline of classification
predicts the class of the nearest training image in pixels (nearest.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.family import PartSamples
from mhmoe_ray.data.images.annotations import Annotation, unpack
from mhmoe_ray.data.images.files import image_size
from mhmoe_ray.data.samples import HeldOutSamples, stored_held_out
from mhmoe_ray.data.shards.columns import ANNOTATION, IMAGE, StoredColumns
from mhmoe_ray.data.shards.manifest import read_classes, require_data_manifest, require_matching_data
from mhmoe_ray.data.sources import Document, FileReader, find_files
from mhmoe_ray.errors import DataError
from mhmoe_ray.evaluate.answer import EvaluationAnswer, EvaluationContext, Progress
from mhmoe_ray.evaluate.measure import RouteCounter
from mhmoe_ray.evaluate.score import AccuracyFigures, ObjectFigures, VisionFigures
from mhmoe_ray.families.images.nearest import NearestImages, training_manifest, training_reader
from mhmoe_ray.families.vision.checkpoint import load_verified_vision
from mhmoe_ray.families.vision.data.batches import task_batch
from mhmoe_ray.families.vision.data.columns import TaskSamples
from mhmoe_ray.families.vision.data.samples import TaskSampleMaker
from mhmoe_ray.families.vision.evaluate.objects import StoredDetection, average_precision, stored_detection
from mhmoe_ray.families.vision.model import Features, TaskBatch, Vision
from mhmoe_ray.spec import DataSpec, MicroBatchPart, RunSpec
from mhmoe_ray.storage import location


class TaskOutputs(NamedTuple):
    """Outputs of a vision model's task for a batch of its images."""

    losses: list[np.ndarray]
    """Values of each loss of the task, one for each image."""
    logits_NC: np.ndarray | None
    """Logits of the classes of each image; None for a detection task."""
    detections: list[StoredDetection]
    """Objects found in each image, in the pixels of the stored image; empty for a classification task."""


class VisionMeter:
    """Evaluator that runs the tasks of a vision model on one device, and counts routes."""

    def __init__(self, model: Vision, *, use_bfloat16: bool, on_progress: Progress) -> None:
        self._model, self._use_bfloat16, self._on_progress = model, use_bfloat16, on_progress
        self._device = next(model.parameters()).device
        self.counter = None if model.spec.moe is None else RouteCounter(model)

    @torch.no_grad()
    def run(
        self, part: MicroBatchPart, samples: PartSamples[TaskSamples], images: Sequence[bytes], label: str
    ) -> Iterator[TaskOutputs]:
        """Yield the outputs of a task for each batch of its samples, whose routes are counted under `label`."""
        names = list(self._model.tasks)
        task_number = names.index(part.name)
        empty = [self._empty_batch(name) for name in names]
        for start in range(0, len(images), part.samples):
            stop = min(len(images), start + part.samples)
            batch = list(empty)
            batch[task_number] = task_batch(samples.rows(start, stop), self._device)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._use_bfloat16):
                all_features = self._encode(batch, task_number, label)
                losses = [loss.value_I for loss in self._model.losses(tuple(batch), all_features)]
                features = all_features.patches[task_number]
                detections, logits_NC = list[StoredDetection](), None
                if part.objective == "classify":
                    logits_NC = self._model.class_logits(part.name, features).cpu().numpy()
                else:
                    size = self._model.tasks[part.name].image_size
                    for content, detection in zip(
                        images[start:stop], self._model.detect(part.name, features), strict=True
                    ):
                        width, height = image_size(content)
                        detections.append(stored_detection(detection, width, height, size))
            own_losses = [loss.cpu().numpy() for loss in losses if len(loss)]
            yield TaskOutputs(own_losses, logits_NC, detections)
            self._on_progress(label, stop, len(images))

    def _encode(self, batch: Sequence[TaskBatch], task_number: int, label: str) -> Features:
        """Return the features of a batch in which only one task has images, and count their routes."""
        images = [task.image_NYXC for task in batch]
        if self.counter is None:
            return self._model.encode(images)
        vision = self._model.spec.vision
        assert vision is not None
        positions = vision.positions(list(vision.tasks.values())[task_number])
        mask_N = torch.ones(len(images[task_number]) * positions, dtype=torch.bool, device=self._device)
        with self.counter.counting_routes(label, mask_N, self._model.top_k[task_number]):
            return self._model.encode(images)

    def _empty_batch(self, name: str) -> TaskBatch:
        size = self._model.tasks[name].image_size
        image_NYXC = torch.empty((0, size, size, 3), dtype=torch.uint8, device=self._device)
        is_classified = self._model.tasks[name].detector is None
        return TaskBatch(image_NYXC, image_NYXC.new_empty(0, dtype=torch.int64) if is_classified else None)


def vision_figures(context: EvaluationContext) -> EvaluationAnswer:
    """Evaluate a vision model, and count routes by task.

    Images that cannot be read, and other data than the run was trained on, are a DataError.
    """
    request, run, checkpoint, manifest, print_line, on_progress = context
    model, spec, classes = load_verified_vision(checkpoint, manifest), run.spec(), read_classes(run.classes_file)
    if request.gpus:
        model.to("cuda")
    if request.text:
        images_by_task = _raw_images(request.text, spec, classes, request.samples)
    else:
        assert request.prepared is not None
        require_matching_data(manifest.data_sha256, location(request.prepared), "or evaluate other images")
        images_by_task = stored_held_out(
            spec, require_data_manifest(location(request.prepared)), TaskSampleMaker.columns
        )
    meter = VisionMeter(model, use_bfloat16=request.half, on_progress=on_progress)
    figures, maker = VisionFigures(losses={}), TaskSampleMaker(spec, classes)
    for part in spec.parts:
        if (stored := images_by_task.get(part.name)) is None:
            continue
        images, annotations = stored[IMAGE], [unpack(content) for content in stored[ANNOTATION]]
        _check_annotations(part, annotations, classes[part.name])
        samples = HeldOutSamples(maker, part, stored)
        outputs = list(meter.run(part, samples, images, f"{part.name} images"))
        for name, values in zip(part.losses, zip(*(o.losses for o in outputs), strict=True), strict=True):
            figures.losses[name] = float(np.concatenate(values).mean())
        if part.objective == "classify":
            logits_NC = np.concatenate([o.logits_NC for o in outputs if o.logits_NC is not None])
            neighbours = _read_baseline(spec, part, manifest, print_line)
            figures.classes[part.name] = _accuracy_figures(
                logits_NC, annotations, classes[part.name], images, neighbours
            )
        else:
            detections = [detection for o in outputs for detection in o.detections]
            figures.objects[part.name] = ObjectFigures(
                images=len(annotations),
                objects=sum(not i.is_crowd for annotation in annotations for i in annotation.instances),
                precision=average_precision(
                    images, annotations, detections, classes[part.name], finds_masks=part.has_masks
                ),
            )
    routing = {} if meter.counter is None else meter.counter.routing_counts()
    return {"vision": figures, "routing": routing}


def _raw_images(
    data: DataSpec, spec: RunSpec, classes: Mapping[str, Sequence[str]], max_images: int
) -> dict[str, StoredColumns]:
    """Return the annotated images in raw data by task, at most `max_images` of each source."""
    rows_by_source: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in data.sources}
    for file in find_files(data):
        rows = rows_by_source[source_of(file.domain)]
        for item in FileReader(file, data):
            if len(rows) >= max_images:
                break
            if isinstance(item, Document) and item.image is not None and item.annotation is not None:
                rows.append((item.image, item.annotation))
    rows_by_task: dict[str, list[tuple[bytes, bytes]]] = {}
    for name, rows in rows_by_source.items():
        task = _task_of_source(name, data, spec, classes, [annotation for _, annotation in rows])
        rows_by_task.setdefault(task, []).extend(rows)
    return {
        task: dict(zip((IMAGE, ANNOTATION), map(list, zip(*rows, strict=True)), strict=True))
        for task, rows in rows_by_task.items()
    }


def _task_of_source(
    name: str, data: DataSpec, spec: RunSpec, classes: Mapping[str, Sequence[str]], annotations: Sequence[bytes]
) -> str:
    """Return the task of a source's images; none or several that fit, or no usable image, is a DataError.

    Candidates are the tasks whose training samples have the same columns as the source. Among several, the one with the
    name of the source is chosen, or else the only one that knows all of its classes.
    """
    columns = set(data.sources[name].sample_columns)
    tasks = [part.name for part in spec.parts if set(part.columns) == columns]
    if not tasks:
        fix = f"set data.sources.{name}.columns and format to those of images with classes or objects"
        raise DataError(f"source {name}", "no task of the model is about what its columns have", fix)
    if not annotations:
        raise DataError(f"source {name}", "no image in it can be used", "see `mhmoe data inspect`")
    if name in tasks or len(tasks) == 1:
        return name if name in tasks else tasks[0]
    class_names = {class_name for content in annotations for class_name in unpack(content).class_names}
    fitting_tasks = [task for task in tasks if class_names.issubset(classes[task])]
    if len(fitting_tasks) != 1:
        reason = f"its classes fit {len(fitting_tasks)} of the tasks {', '.join(tasks)}"
        raise DataError(f"source {name}", reason, "give the source the name of its task")
    return fitting_tasks[0]


def _check_annotations(part: MicroBatchPart, annotations: Sequence[Annotation], names: Sequence[str]) -> None:
    """Raise a DataError if an image has an unknown class, or an object lacks the mask that the model's loss needs."""
    subject = f"images of task {part.name}"
    unknown_names = sorted({name for annotation in annotations for name in annotation.class_names} - set(names))
    if unknown_names:
        reason = f"the model was not trained on {len(unknown_names)} of its classes, such as {unknown_names[0]!r}"
        raise DataError(subject, reason, "evaluate images of the classes of the training")
    instances = [instance for annotation in annotations for instance in annotation.instances if not instance.is_crowd]
    maskless_objects = sum(instance.mask is None for instance in instances)
    if part.has_masks and maskless_objects:
        raise DataError(subject, f"{maskless_objects:,} of their objects have no mask", "add masks")


class _Neighbours(NamedTuple):
    """Baseline of a classification task: the training images, and the class of each training sample."""

    nearest_images: NearestImages
    classes: list[str]


def _read_baseline(
    spec: RunSpec, part: MicroBatchPart, checkpoint_manifest: CheckpointManifest, print_line: Callable[[str], None]
) -> _Neighbours | None:
    """Return the training images of a task with their classes; None if the training data is gone or was replaced."""
    manifest = training_manifest(spec, checkpoint_manifest.data_sha256, print_line)
    if manifest is None:
        return None
    reader = training_reader(spec, manifest, part.sources)
    annotations = reader.read_values(ANNOTATION, np.arange(len(reader)))
    class_names = [unpack(content).class_name or "" for content in annotations]
    return _Neighbours(NearestImages.of_training(reader), class_names)


def _accuracy_figures(
    logits_NC: np.ndarray,
    annotations: Sequence[Annotation],
    class_names: Sequence[str],
    images: Sequence[bytes],
    neighbours: _Neighbours | None,
) -> AccuracyFigures:
    """Return the accuracy of a classification task, and that of its baseline unless `neighbours` is None."""
    names = [annotation.class_name or "" for annotation in annotations]
    numbers = {name: number for number, name in enumerate(class_names)}
    class_N = np.array([numbers[name] for name in names])
    # If another class has the same logit as the right one, the other class is ranked before it. A logit that is not a
    # number is below none, so that a model that has diverged classifies nothing.
    rank_N = (~(logits_NC < logits_NC[np.arange(len(class_N)), class_N][:, None])).sum(1) - 1
    baseline = largest_class = None
    if neighbours is not None:
        nearest_names = [neighbours.classes[number] for number in neighbours.nearest_images.nearest_samples(images)]
        baseline = float(np.mean([a == b for a, b in zip(nearest_names, names, strict=True)]))
        most_frequent = max(set(neighbours.classes), key=lambda name: (neighbours.classes.count(name), name))
        largest_class = float(np.mean([name == most_frequent for name in names]))
    return AccuracyFigures(
        images=len(class_N),
        classes=len(set(names)),
        top_1=float((rank_N < 1).mean()),
        top_5=float((rank_N < 5).mean()),
        baseline=baseline,
        largest_class=largest_class,
        training_images=None if neighbours is None else neighbours.nearest_images.image_count,
    )
