"""Checks that the data suffice for training and validation, before shards are written."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.shards.manifest import Domain
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec, RunSpec

if TYPE_CHECKING:
    # Only type checkers need this import. At run time it would import Ray, which the command line does not need for
    # data that are already prepared.
    from mhmoe_ray.data.prepare.parts import TokenisedPart


def check_not_empty(spec: DataSpec, by_domain: "dict[str, list[TokenisedPart]]") -> None:
    """Raise DataError unless some domain fills a validation sample and some domain a training sample."""
    # This check does not run in a Ray task, because Ray would wrap its error in a traceback.
    fix = "raise data.validation_fraction or add documents"
    if not any(part.counts.held_out_documents for parts in by_domain.values() for part in parts):
        raise DataError("validation", "no document is in the held-out share", fix)
    if all(sum(part.counts.held_out_tokens for part in parts) < 2 for parts in by_domain.values()):
        raise DataError("validation", "the documents of the held-out share have no tokens", fix)
    min_tokens = 1 if spec.packing == "best_fit" else spec.seq_len + 1
    if all(sum(part.counts.tokens for part in parts) < min_tokens for parts in by_domain.values()):
        raise DataError("training", "no domain fills a single sample", "shorten data.seq_len or add documents")


def sparse_parts(spec: RunSpec, domains: Mapping[str, Domain]) -> list[str]:
    """Return a warning for each part with fewer held-out samples than samples in a micro-batch."""
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
