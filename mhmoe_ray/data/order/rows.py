"""Rows of prepared images in the order of a training: where the sample at a position is stored."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.shards.manifest import require_data_manifest
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
        """The label of each sample, which decides its crop and its masks."""
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
