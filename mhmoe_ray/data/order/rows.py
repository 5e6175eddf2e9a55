"""Stored rows of encoders and vision models: the row at each position of a training, and the held-out rows."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.shards.manifest import DataManifest, require_data_manifest
from mhmoe_ray.data.shards.rows import RowReader
from mhmoe_ray.spec import MicroBatchPart, RunSpec


class RowGroup(NamedTuple):
    """Samples of one domain among requested positions, with the rows that store them."""

    indices: np.ndarray
    """Indices of the samples in the requested positions."""
    reader: RowReader
    numbers: np.ndarray
    """Numbers of the rows within the domain."""


class PartPositions(NamedTuple):
    """Positions in the whole training of one part's samples in a micro-batch."""

    part: MicroBatchPart
    positions: np.ndarray

    @property
    def labels(self) -> list[str]:
        """Labels that, with the seed of the run, determine each sample's random crop and masks."""
        return [f"{self.part.name} {position}" for position in self.positions]


class RowOrder:
    """Order of the samples in the training of an encoder or a vision model."""

    def __init__(self, spec: RunSpec) -> None:
        folder = spec.data.prepared
        manifest = require_data_manifest(folder)
        self._spec, self.token_bytes = spec, manifest.token_bytes
        names, self._order = training_order(spec, manifest)
        self._readers = [RowReader(folder, manifest.domains[name].shards, manifest.token_bytes) for name in names]

    def parts(self, micro_batch: int) -> Iterator[PartPositions]:
        """Yield the positions of each part's samples in micro-batch number `micro_batch` of the training."""
        first_position = micro_batch * self._spec.train.micro_batch_size
        for part in self._spec.parts:
            yield PartPositions(part, first_position + np.arange(part.samples))
            first_position += part.samples

    def locate(self, positions: np.ndarray) -> Iterator[RowGroup]:
        """Yield the stored rows at these positions, one group for each domain."""
        domains, numbers = self._order(positions)
        for domain in np.unique(domains):
            indices = np.flatnonzero(domains == domain)
            yield RowGroup(indices, self._readers[domain], numbers[indices])


def held_out_numbers(spec: RunSpec, manifest: DataManifest) -> dict[str, np.ndarray]:
    """Return, for each part with held-out rows, their numbers among all held-out rows of the folder."""
    # Validation samples are stored domain after domain in the manifest's order.
    counts = [domain.validation_samples for domain in manifest.domains.values()]
    sources = np.repeat([source_of(name) for name in manifest.domains], counts)
    numbers = {part.name: np.flatnonzero(np.isin(sources, part.sources)) for part in spec.parts}
    return {name: rows for name, rows in numbers.items() if len(rows)}
