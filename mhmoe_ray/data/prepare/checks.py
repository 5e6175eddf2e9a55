"""Checks that the data suffice for training and validation, which a preparation makes before it writes shards."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.shards.manifest import Domain
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec, RunSpec

if TYPE_CHECKING:
    # Only type checkers need this import. At run time it would import Ray, which the command line does not need for
    # data that are already prepared.
    from mhmoe_ray.data.prepare.tokenise import Part


def check_not_empty(spec: DataSpec, by_domain: "dict[str, list[Part]]") -> None:
    """Check that at least one domain fills a validation sample, and at least one domain fills a training sample.

    Tokens of different domains do not add up: a sample has tokens of one domain.

    Raises:
        DataError: no domain has a validation sample, or none has a training sample.
    """
    # This check does not run in a Ray task, because Ray would wrap its error in a traceback.
    fix = "raise data.validation_fraction or add documents"
    if not any(part.counts.held_out_documents for parts in by_domain.values() for part in parts):
        raise DataError("validation", "no document is in the held-out share", fix)
    if all(sum(part.counts.held_out_tokens for part in parts) < 2 for parts in by_domain.values()):
        raise DataError("validation", "the documents of the held-out share have no tokens", fix)
    min_tokens = 1 if spec.packing == "best_fit" else spec.seq_len + 1
    if all(sum(part.counts.tokens for part in parts) < min_tokens for parts in by_domain.values()):
        raise DataError("training", "no domain fills a single sample", "shorten data.seq_len or add documents")


def check_rows_not_empty(spec: RunSpec, by_domain: "dict[str, list[Part]]") -> None:
    """Check that an encoder has training samples, held-out samples, and enough image patches for its codebook.

    If any source has texts, some training samples and some held-out samples must have a text.

    Raises:
        DataError: some of these are missing.
    """
    assert spec.model.encoder is not None
    counts = [part.counts for parts in by_domain.values() for part in parts]
    fix = "raise data.validation_fraction or add documents"
    if not any(count.held_out_documents for count in counts):
        raise DataError("validation", "no document is in the held-out share", fix)
    if not any(count.rows and count.rows.samples for count in counts):
        raise DataError("training", "every document is in the held-out share", "add documents")
    if spec.data.has_texts:
        if not any(count.held_out_tokens for count in counts):
            raise DataError("validation", "no document of the held-out share has a text", fix)
        if not any(count.rows and count.rows.targets for count in counts):
            raise DataError("training", "no document has a text to train on", "add documents with texts")
    patches = sum(count.rows.images for count in counts if count.rows) * spec.model.encoder.patches
    entries = spec.model.encoder.codebook_size
    if spec.has_codebook and patches < entries:
        reason = f"its images have {patches:,} patches, fewer than the {entries:,} entries of the codebook"
        raise DataError("training", reason, "add images, or lower model.encoder.codebook_size")


def sparse_parts(spec: RunSpec, domains: Mapping[str, Domain]) -> list[str]:
    """Return a warning for each part of micro-batches that has fewer held-out samples than samples in a micro-batch.

    Args:
        spec: spec of an encoder or a vision model.
        domains: the domains of the prepared data, by name.
    """
    warnings = []
    for part in spec.parts:
        count = sum(domain.validation_samples for name, domain in domains.items() if source_of(name) in part.sources)
        if count < part.samples:
            warnings.append(
                f"part {part.name} has fewer held-out samples ({count:,}) than samples in a micro-batch "
                f"({part.samples:,}), so its validation losses say little: raise data.validation_fraction and "
                "data.validation_samples, or add documents"
            )
    return warnings


def classes_of_tasks(spec: RunSpec, by_domain: "Mapping[str, Sequence[Part]]") -> dict[str, list[str]]:
    """Return the names of the classes of each task of a vision model, sorted.

    Raises:
        DataError: a task has no training samples or no held-out samples, no class, or more classes than outputs; or its
            detector learns masks, and an object has no mask.
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
