"""The interface of a family's data: settings and files of a prepared folder, rows of the stream."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import BaseModel

from mhmoe_ray.spec import ModelSpec, RunSpec

if TYPE_CHECKING:
    # At run time this import would import Ray, which commands do not need for data that are already prepared.
    from mhmoe_ray.data.prepare.tokenise import Part
    from mhmoe_ray.data.shards.manifest import Shard

Facts = dict[str, BaseModel]
"""Facts about a prepared folder that only one family has, by their field in the data manifest."""


class MicroBatchSamples(Protocol):
    """Random access to the samples of a training, by micro-batch number."""

    def read(self, micro_batch: int) -> Any:
        """Return the samples of a micro-batch."""


class FamilyData(ABC):
    """Data of one family's models."""

    has_rows = True
    """Whether each document becomes rows of its own and a row of the stream is a micro-batch. Otherwise documents are
    packed as tokens, and a row of the stream is a sample."""

    def add_to_recipe(self, spec: RunSpec, settings: dict[str, Any]) -> None:
        """Add the settings that determine the content of a prepared folder to its recipe."""
        return

    @abstractmethod
    def check_parts(self, spec: RunSpec, folder: Path, by_domain: "dict[str, list[Part]]") -> Facts:
        """Check, before shards are written, that there are samples for training and validation.

        Args:
            spec: spec of the run.
            folder: staging directory of the result, which may get further files.
            by_domain: tokenised parts of each domain.

        Raises:
            DataError: samples are missing, or do not suit the model.
        """

    def finish(
        self,
        spec: RunSpec,
        folder: Path,
        by_domain: "Mapping[str, Sequence[Part]]",
        shards: "Mapping[str, Sequence[Shard]]",
        log: Callable[[str], None],
    ) -> Facts:
        """Write files that follow from the training shards; `log` gets a line for the user."""
        return {}

    def micro_batch_bytes(self, spec: RunSpec) -> int:
        """Return the approximate bytes of a micro-batch in the stream, if `has_rows`."""
        raise NotImplementedError

    def training_samples(self, spec: RunSpec) -> MicroBatchSamples:
        """Return the training samples, if `has_rows`; a process caches them for its next tasks."""
        raise NotImplementedError

    def stream_columns(self, micro_batches: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return micro-batches from `training_samples` as columns of the stream, if `has_rows`."""
        raise NotImplementedError


class DecoderData(FamilyData):
    """Data of decoders: documents as tokens."""

    has_rows = False

    def check_parts(self, spec: RunSpec, folder: Path, by_domain: "dict[str, list[Part]]") -> Facts:
        from mhmoe_ray.data.prepare.checks import check_not_empty

        check_not_empty(spec.data, by_domain)
        return {}


def data_of(model: ModelSpec) -> FamilyData:
    """Return the data of a model's family."""
    data: type[FamilyData] = model.family.part("data")
    return data()
