"""The documents that a run has read at each step: the order of samples, read in both directions.

step and rank -> positions -> samples -> documents     `documents_of_step`
document -> samples -> positions -> steps and ranks    `steps_of_document`
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.inspect.samples import decode_samples
from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.columns import padding_token, target_mask
from mhmoe_ray.data.shards.documents import DocumentIndex, DocumentOrigin
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.errors import DataError, RunError
from mhmoe_ray.spec import RunSpec

POSITIONS_PER_SCAN = 1 << 20

_Piece = tuple[int, bool | None, float | None, str | None]
"""Offset in the sample, and the last three fields of a `StepDocument`."""


class RunReading(NamedTuple):
    """The part of a training order that a run has read."""

    run: str
    spec: RunSpec
    samples_before: Mapping[str, int] | None
    steps: int
    """Last step that it has done."""
    groups: Sequence[tuple[int, int]]
    """Last step before each worker group, and the number of its workers; the newest group last."""

    def workers_at(self, step: int) -> int:
        """Return the number of workers that did a step, from 1."""
        return next(workers for previous_step, workers in reversed(self.groups) if previous_step < step)


class StepDocument(NamedTuple):
    """Document, or a piece of it, in a sample of a step."""

    rank: int
    position: int
    """Position of the sample in the whole training, from 0."""
    domain: str
    sample: int
    """Number of the sample within its domain, from 0."""
    file: str | None
    """Path or URI of the raw file, followed by the name of an image; None for data without an index."""
    line: int | None
    """First line of the document in the file, or its row or member, from 1."""
    begins: bool | None
    """True if the piece is the beginning of the document; None for an image, as `weight` and `text`."""
    weight: float | None
    """Share of the step's targets, all of which have the same weight in its loss."""
    text: str | None


class DocumentRead(NamedTuple):
    """A sample with text of a document, read at a step."""

    run: str
    step: int
    rank: int
    position: int
    domain: str
    sample: int
    file: str
    line: int


def documents_of_step(reading: RunReading, step: int, rank: int | None = None) -> list[StepDocument]:
    """Return the documents of a step, from 1, in their order; those that one rank read, if it is given.

    A step or rank that the run did not have is a RunError; data that are not prepared are a DataError.
    """
    if not 1 <= step <= reading.steps:
        fix = f"name a step from 1 to {reading.steps:,}" if reading.steps else "wait for its first step"
        raise RunError(f"step {step:,}", f"run {reading.run} has done {reading.steps:,} steps", fix)
    workers, spec = reading.workers_at(step), reading.spec
    if rank is not None and not 0 <= rank < workers:
        reason = f"step {step:,} of run {reading.run} had {workers:,} workers"
        raise RunError(f"rank {rank:,}", reason, f"name a rank from 0 to {workers - 1:,}")
    all_positions = (step - 1) * spec.samples_per_step + np.arange(spec.samples_per_step)
    ranks = _ranks(spec, all_positions, workers)
    is_wanted = np.ones(len(ranks), np.bool_) if rank is None else ranks == rank
    positions = all_positions[is_wanted].tolist()
    manifest = require_data_manifest(spec.data.prepared)
    indexes = {name: DocumentIndex(spec.data.prepared, domain.shards) for name, domain in manifest.domains.items()}
    samples = TrainingSamples(spec, reading.samples_before)
    documents = []
    rows = zip(
        ranks[is_wanted].tolist(),
        positions,
        samples.locate_samples(positions),
        _pieces_of(reading, samples, positions, all_positions),
        strict=True,
    )
    for row_rank, position, (domain, sample), pieces in rows:
        origins = indexes[domain].documents_of(sample)
        for offset, begins, weight, text in pieces:
            file, line = (None, None) if origins is None else origins[offset]
            documents.append(StepDocument(row_rank, position, domain, sample, file, line, begins, weight, text))
    return documents


def _pieces_of(
    reading: RunReading, samples: TrainingSamples, positions: Sequence[int], all_positions: np.ndarray
) -> list[list[_Piece]]:
    """Return the pieces of documents in the samples at `positions`, of a step with `all_positions`."""
    spec = reading.spec
    if data_of(spec.model).has_rows:
        return [[(0, None, None, None)]] * len(positions)
    targets = int(target_mask(samples.read(all_positions), padding_token(samples.token_bytes))[:, 1:].sum())
    return [
        [
            (part.offset, part.begins, part.targets / max(1, targets), part.text)
            for part in decoded_sample.parts
            # The last token of a sample is no input. If it begins a document, that belongs to another sample.
            if part.tokens > 1 or part.targets
        ]
        for decoded_sample in decode_samples(spec, positions, reading.samples_before)
    ]


def _ranks(spec: RunSpec, positions: np.ndarray, workers: int) -> np.ndarray:
    """Return the rank that reads each position: the micro-batches of the training go to the ranks in turn."""
    return np.asarray(positions // spec.train.micro_batch_size % workers)


def steps_of_document(readings: Sequence[RunReading], file: str, line: int | None = None) -> list[DocumentRead]:
    """Return where runs have read a document or, without a line, any document of a file; in the order of the runs.

    A document that is in the training samples of no run, or data without an index, are a DataError.
    """
    reads, is_prepared = list[DocumentRead](), False
    for reading in readings:
        origins = _origins_by_sample(reading.spec, file, line)
        is_prepared |= any(origins.values())
        names, order = training_order(
            reading.spec, require_data_manifest(reading.spec.data.prepared), reading.samples_before
        )
        position_count = reading.steps * reading.spec.samples_per_step
        for start in range(0, position_count, POSITIONS_PER_SCAN):
            positions = np.arange(start, min(start + POSITIONS_PER_SCAN, position_count))
            domains, samples = order(positions)
            for i in _wanted_indices(names, domains, samples, origins):
                step = int(positions[i]) // reading.spec.samples_per_step + 1
                rank = int(_ranks(reading.spec, positions[i], reading.workers_at(step)))
                name, sample = names[domains[i]], int(samples[i])
                for origin in origins[name][sample]:
                    reads.append(DocumentRead(reading.run, step, rank, int(positions[i]), name, sample, *origin))
    if not is_prepared:
        subject = file if line is None else f"{file}:{line}"
        reason = f"it is in no training sample of run {readings[0].run}"
        fix = "name a file and line as `mhmoe data at` shows them; held-out and quarantined documents are not read"
        raise DataError(f"document {subject}", reason, fix)
    return reads


def _origins_by_sample(spec: RunSpec, file: str, line: int | None) -> dict[str, dict[int, list[DocumentOrigin]]]:
    """Return the documents in each sample of each domain, of those that `file` and `line` name."""
    folder = spec.data.prepared
    result: dict[str, dict[int, list[DocumentOrigin]]] = {}
    for name, domain in require_data_manifest(folder).domains.items():
        index = DocumentIndex(folder, domain.shards)
        if not index.exists:
            reason = "it has no index of documents, because an earlier version prepared it"
            fix = f"prepare the same data in another folder, then run: mhmoe data copy FOLDER {folder}"
            raise DataError(f"prepared data {folder}", reason, fix)
        result[name] = defaultdict(list)
        for origin, samples in index.samples_of(file, line).items():
            for sample in dict.fromkeys(samples):
                result[name][sample].append(origin)
    return result


def _wanted_indices(
    names: Sequence[str], domains: np.ndarray, samples: np.ndarray, origins: Mapping[str, Mapping[int, object]]
) -> list[int]:
    is_wanted = np.zeros(len(domains), np.bool_)
    for number, name in enumerate(names):
        if origins[name]:
            is_wanted |= (domains == number) & np.isin(samples, list(origins[name]))
    indices: list[int] = np.flatnonzero(is_wanted).tolist()
    return indices
