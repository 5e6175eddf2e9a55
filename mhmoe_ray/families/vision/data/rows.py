"""Data of vision models: rows of annotated images, and the names of their classes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.family import Facts, FamilyData
from mhmoe_ray.data.shards.manifest import CLASSES_FILE, VisionData, read_classes
from mhmoe_ray.errors import DataError
from mhmoe_ray.families.vision.data.columns import stream_columns
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location, describe_file, write_json

if TYPE_CHECKING:
    from mhmoe_ray.data.prepare.parts import TokenisedPart
    from mhmoe_ray.data.samples import TrainingSamples
    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.families.vision.data.samples import TaskSampleMaker


class VisionRows(FamilyData):
    """Data of vision models."""

    def add_to_recipe(self, spec: RunSpec, settings: dict[str, Any]) -> None:
        for name, source in spec.data.sources.items():
            settings["reading"][name] |= {"columns": [*source.sample_columns], "image_field": source.image_field}
            settings["reading"][name]["class_field"] = source.class_field
        settings |= {"sample": "annotated image", "max_megapixels": spec.data.images.max_megapixels}
        settings["tasks"] = {part.name: [*part.sources] for part in spec.parts}

    def check_parts(self, spec: RunSpec, folder: Location, by_domain: "dict[str, list[TokenisedPart]]") -> Facts:
        path = folder / CLASSES_FILE
        write_json(path, classes_of_tasks(spec, by_domain))
        return {"vision": VisionData(classes_sha256=describe_file(path).sha256)}

    def micro_batch_bytes(self, spec: RunSpec) -> int:
        vision = spec.model.vision
        assert vision is not None
        return sum(3 * vision.tasks[part.name].image_size ** 2 * part.samples for part in spec.parts)

    def sample_maker(self, spec: RunSpec, manifest: "DataManifest") -> "TaskSampleMaker":
        from mhmoe_ray.families.vision.data.samples import TaskSampleMaker

        return TaskSampleMaker(spec, read_classes(spec.data.prepared / CLASSES_FILE))

    def stream_columns(self, samples: "TrainingSamples", rows: np.ndarray) -> dict[str, np.ndarray]:
        return stream_columns([samples.read_micro_batch(int(row)) for row in rows])


def classes_of_tasks(spec: RunSpec, by_domain: "Mapping[str, Sequence[TokenisedPart]]") -> dict[str, list[str]]:
    """Return the sorted names of the classes of each task.

    A DataError reports a task without training samples, held-out samples or classes, with more classes than outputs, or
    with a detector of masks and an object without one.
    """
    assert spec.model.vision is not None
    classes = {}
    for part in spec.parts:
        counts = [
            row_counts
            for domain, parts in by_domain.items()
            if source_of(domain) in part.sources
            for prepared_part in parts
            if (row_counts := prepared_part.counts.rows) is not None
        ]
        subject, names = f"task {part.name}", {name for count in counts for name in count.class_names}
        for total, kind in (
            (sum(c.samples for c in counts), "training"),
            (sum(c.held_out_samples for c in counts), "held-out"),
        ):
            if not total:
                raise DataError(subject, f"it has no {kind} images", "change data.validation_fraction or add images")
        if not names:
            raise DataError(subject, "its images have no objects", "add annotations")
        maskless_objects = sum(count.objects_without_mask for count in counts)
        if part.has_masks and maskless_objects:
            fix = f"add masks, or set model.vision.tasks.{part.name}.detector.masks to false"
            raise DataError(subject, f"{maskless_objects:,} of its objects have no mask", fix)
        limit = spec.model.vision.tasks[part.name].classes
        if len(names) > limit:
            reason = f"its images have {len(names):,} classes, and its head has {limit:,} outputs"
            raise DataError(subject, reason, f"raise model.vision.tasks.{part.name}.classes to {len(names)}")
        classes[part.name] = sorted(names)
    return classes
