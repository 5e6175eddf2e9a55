"""The interface of a family's data: settings and files of a prepared folder, rows of the stream."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel

from mhmoe_ray.data.shards.columns import EXPERT, SAMPLE, StoredColumns, columns_of
from mhmoe_ray.spec import MicroBatchPart, ModelSpec, RunSpec
from mhmoe_ray.storage import Location

if TYPE_CHECKING:
    # At run time these imports would import Ray, which commands do not need for data that are already prepared.
    from mhmoe_ray.data.prepare.parts import TokenisedPart
    from mhmoe_ray.data.samples import TrainingSamples
    from mhmoe_ray.data.shards.manifest import DataManifest, Shard

Facts = dict[str, BaseModel]
"""Facts about a prepared folder that only one family has, by their field in the data manifest."""


T_co = TypeVar("T_co", covariant=True)


class PartSamples(Protocol[T_co]):
    """Samples of one part of micro-batches, in memory or made on access."""

    @property
    def sample_count(self) -> int:
        """The number of samples of the part."""

    def rows(self, start: int, stop: int) -> T_co:
        """Return samples `start` to `stop` - 1 of the part."""


class PartSampleMaker(ABC):
    """Maker of the samples that a family's model reads, from stored ones."""

    columns: tuple[str, ...]
    """Columns of the stored samples."""

    @abstractmethod
    def make(self, part: MicroBatchPart, stored: StoredColumns, labels: Sequence[str], *, crops: bool) -> Any:
        """Return samples of a part.

        With the seed of the run, a sample's label determines all random choices; images are cropped at random only if
        `crops` is true, as in training.
        """


class FamilyData(ABC):
    """Data of one family's models."""

    has_rows = True
    """Whether each document becomes rows of its own and a row of the stream is a micro-batch. Otherwise documents are
    packed as tokens, and a row of the stream is a sample."""

    def add_to_recipe(self, spec: RunSpec, settings: dict[str, Any]) -> None:
        """Add the settings that determine the content of a prepared folder to its recipe."""
        return

    @abstractmethod
    def check_parts(self, spec: RunSpec, folder: Location, by_domain: "dict[str, list[TokenisedPart]]") -> Facts:
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
        folder: Location,
        by_domain: "Mapping[str, Sequence[TokenisedPart]]",
        shards: "Mapping[str, Sequence[Shard]]",
        log: Callable[[str], None],
    ) -> Facts:
        """Write files that follow from the training shards; `log` gets a line for the user."""
        return {}

    @abstractmethod
    def micro_batch_bytes(self, spec: RunSpec) -> int:
        """Return the approximate bytes of a micro-batch in the stream."""

    @abstractmethod
    def stream_columns(self, samples: "TrainingSamples", rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows of the stream, numbered from the start of the training, as its columns without `position`."""

    def sample_maker(self, spec: RunSpec, manifest: "DataManifest") -> PartSampleMaker:
        """Return the maker of samples, if `has_rows`."""
        raise NotImplementedError


class DecoderData(FamilyData):
    """Data of decoders: documents as tokens."""

    has_rows = False

    def check_parts(self, spec: RunSpec, folder: Location, by_domain: "dict[str, list[TokenisedPart]]") -> Facts:
        from mhmoe_ray.data.prepare.checks import check_not_empty

        check_not_empty(spec.data, by_domain)
        return {}

    def micro_batch_bytes(self, spec: RunSpec) -> int:
        # A token takes at most four bytes.
        return 4 * spec.train.micro_batch_size * (spec.data.seq_len + 1)

    def stream_columns(self, samples: "TrainingSamples", rows: np.ndarray) -> dict[str, np.ndarray]:
        columns, experts = columns_of(samples.read(rows)), samples.experts(rows)
        if samples.has_pairs:
            columns[SAMPLE] = samples.numbers(rows)
        return columns if experts is None else {**columns, EXPERT: experts}


def data_of(model: ModelSpec) -> FamilyData:
    """Return the data of a model's family."""
    data: type[FamilyData] = model.family.part("data")
    return data()
