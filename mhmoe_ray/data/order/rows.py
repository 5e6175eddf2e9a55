"""Rows of prepared images: where the sample at a position of the training is stored, and the held-out ones."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.shards.manifest import DataManifest, require_data_manifest
from mhmoe_ray.data.shards.rows import RowReader
from mhmoe_ray.spec import MicroBatchPart, RunSpec


class RowGroup(NamedTuple):
    """Samples of one domain among the samples at some positions."""

    indices: np.ndarray
    """Indices of these samples among the positions."""
    reader: RowReader
    """Reader of the domain."""
    numbers: np.ndarray
    """Numbers of their rows within the domain."""


class PartPositions(NamedTuple):
    """Positions of the samples of one part in a micro-batch."""

    part: MicroBatchPart
    positions: np.ndarray

    @property
    def labels(self) -> list[str]:
        """The label of each sample. With the seed of the run, it determines the random crop and the masks."""
        return [f"{self.part.name} {position}" for position in self.positions]


class RowOrder:
    """Order of the samples of a training, whose micro-batches have parts."""

    def __init__(self, spec: RunSpec) -> None:
        folder = spec.data.prepared
        manifest = require_data_manifest(folder)
        self._spec, self.token_bytes = spec, manifest.token_bytes
        names, self._order = training_order(spec, manifest)
        self._readers = [RowReader(folder, manifest.domains[name].shards, manifest.token_bytes) for name in names]

    def parts(self, micro_batch: int) -> Iterator[PartPositions]:
        """Yield the positions of each part of a micro-batch, given its number in the training."""
        first_position = micro_batch * self._spec.train.micro_batch_size
        for part in self._spec.parts:
            yield PartPositions(part, first_position + np.arange(part.samples))
            first_position += part.samples

    def locate(self, positions: np.ndarray) -> Iterator[RowGroup]:
        """Yield the samples at these positions, which belong to one part, domain by domain."""
        domains, numbers = self._order(positions)
        for domain in np.unique(domains):
            indices = np.flatnonzero(domains == domain)
            yield RowGroup(indices, self._readers[domain], numbers[indices])


def held_out_numbers(spec: RunSpec, manifest: DataManifest) -> dict[str, np.ndarray]:
    """Return the numbers of the held-out rows of each part that has any, among all held-out rows.

    Args:
        spec: spec of the run.
        manifest: manifest of its prepared data.
    """
    # Held-out rows are stored domain after domain in the manifest's order.
    counts = [domain.validation_samples for domain in manifest.domains.values()]
    sources = np.repeat([source_of(name) for name in manifest.domains], counts)
    numbers = {part.name: np.flatnonzero(np.isin(sources, part.sources)) for part in spec.parts}
    return {name: rows for name, rows in numbers.items() if len(rows)}
