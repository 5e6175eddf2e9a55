"""Average precision of detected objects, by their boxes and by their masks, as COCO defines it (pycocotools)."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mhmoe_ray.data.images.annotations import Annotation
from mhmoe_ray.data.images.files import image_size
from mhmoe_ray.evaluate.score import ObjectPrecision
from mhmoe_ray.families.vision.data.fit import Fit, stored_boxes, stored_probabilities
from mhmoe_ray.families.vision.model import Detection, paste_mask

MASK_THRESHOLD = 0.5
"""Probability from which on a pixel belongs to the mask of an object."""
DUPLICATE_OVERLAP = 0.5
"""Overlap (intersection over union) above which two boxes count as one object, regardless of their classes."""


class StoredDetection(NamedTuple):
    """Objects that a model found in an image, in pixels of the stored image."""

    boxes: np.ndarray
    """Left, top, right and bottom edges of each object, (objects, 4) float64."""
    classes: np.ndarray
    """Number of each object's class, (objects,) int64."""
    scores: np.ndarray
    masks: list[bytes]
    """Mask of each object as COCO's compressed run lengths; empty if the model finds no masks."""


def stored_detection(detection: Detection, width: int, height: int, size: int) -> StoredDetection:
    """Convert detected objects from the square of `size` pixels that the model reads to pixels of the stored image."""
    fit = Fit.of_image(width, height, size)
    boxes = stored_boxes(detection.box_O4.cpu().numpy(), width, height, fit)
    # Masks are made one at a time, because an image may have a hundred objects. Without masks, the loop ends at once.
    masks = [
        stored_mask(paste_mask(box_mask_YX, box_4, size).cpu().numpy(), width, height, fit)
        for box_mask_YX, box_4 in zip(detection.box_mask_OYX, detection.box_O4, strict=False)
    ]
    return StoredDetection(boxes, detection.class_O.cpu().numpy(), detection.score_O.cpu().numpy(), masks)


def stored_mask(mask: np.ndarray, width: int, height: int, fit: Fit) -> bytes:
    """Return an object's mask in the stored image as COCO's compressed run lengths; `mask` has the probabilities in the
    square that the model reads."""
    from pycocotools import mask as coco_masks

    is_object_YX = stored_probabilities(mask, width, height, fit) >= MASK_THRESHOLD
    counts: bytes = coco_masks.encode(np.asfortranarray(is_object_YX, np.uint8))["counts"]
    return counts


def average_precision(
    images: Sequence[bytes],
    annotations: Sequence[Annotation],
    detections: Sequence[StoredDetection],
    class_names: Sequence[str],
    *,
    finds_masks: bool,
) -> ObjectPrecision:
    """Return the average precision of the objects that a model detected; true objects that are crowds are ignored."""
    has_masks = finds_masks and all(
        instance.mask is not None for annotation in annotations for instance in annotation.instances
    )
    numbers = {name: number for number, name in enumerate(class_names)}
    sizes = [image_size(content)[::-1] for content in images]
    truth: dict[str, Any] = {
        "info": {},
        "images": [{"id": n, "height": h, "width": w} for n, (h, w) in enumerate(sizes)],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
        "annotations": [],
    }
    for image, annotation in enumerate(annotations):
        for instance in annotation.instances:
            x0, y0, x1, y1 = instance.box
            entry: dict[str, Any] = {
                "id": len(truth["annotations"]) + 1,
                "image_id": image,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            }
            entry |= {"category_id": numbers[instance.class_name], "iscrowd": int(instance.is_crowd)}
            entry["area"] = (x1 - x0) * (y1 - y0)
            if instance.mask is not None:
                entry["segmentation"] = {"size": list(sizes[image]), "counts": instance.mask}
                entry["area"] = _mask_area(entry["segmentation"])
            truth["annotations"].append(entry)
    results, any_class_results = [], []
    for image, detection in enumerate(detections):
        distinct = _distinct_boxes(detection)
        for number, (x0, y0, x1, y1) in enumerate(detection.boxes.tolist()):
            entry = {"image_id": image, "category_id": int(detection.classes[number])}
            entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": float(detection.scores[number])}
            if has_masks:
                entry["segmentation"] = {"size": list(sizes[image]), "counts": detection.masks[number]}
            results.append(entry)
            if number in distinct:
                any_class_results.append(entry)
    boxes = _precisions(truth, results, "bbox", by_class=True)
    masks = _precisions(truth, results, "segm", by_class=True) if has_masks else None
    return ObjectPrecision(
        box_ap=boxes[0],
        box_ap50=boxes[1],
        box_ap75=boxes[2],
        mask_ap=None if masks is None else masks[0],
        mask_ap50=None if masks is None else masks[1],
        any_class_box_ap50=_precisions(truth, any_class_results, "bbox", by_class=False)[1],
    )


def _distinct_boxes(detection: StoredDetection) -> set[int]:
    """Return the numbers of the boxes that remain if classes are ignored and duplicates are removed.

    A detector reports a region once for each class that it may have. If classes are ignored, all but one of these boxes
    would count as errors.
    """
    from torchvision.ops import nms

    boxes, scores = (torch.tensor(values, dtype=torch.float32) for values in (detection.boxes, detection.scores))
    return set(nms(boxes, scores, DUPLICATE_OVERLAP).tolist())


def _mask_area(mask: dict[str, Any]) -> float:
    from pycocotools import mask as coco_masks

    return float(coco_masks.area(mask))


def _precisions(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str, *, by_class: bool
) -> tuple[float, float, float]:
    """Return the average precision over overlaps from 0.5 to 0.95, that at 0.5, and that at 0.75; 0 without detections.

    Objects are in COCO's form, and `kind` is `bbox` for boxes or `segm` for masks.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not results:
        return 0.0, 0.0, 0.0
    # pycocotools prints progress to stdout, which is discarded here.
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([dict(result) for result in results]), kind)
        evaluation.params.useCats = int(by_class)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools returns -1 for a precision without any true object.
    overall, at_50, at_75 = (max(0.0, float(value)) for value in evaluation.stats[:3])
    return overall, at_50, at_75
