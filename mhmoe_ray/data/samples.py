"""The samples of a prepared folder: those of the training by position, and the held-out ones."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, overload

import numpy as np

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.family import PartSampleMaker, data_of
from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.shards.cache import plan_cache
from mhmoe_ray.data.shards.columns import (
    TOKENS,
    ModelSamples,
    Samples,
    StoredColumns,
    padding_token,
    to_model_samples,
    with_all_columns,
)
from mhmoe_ray.data.shards.manifest import DataManifest, require_data_manifest
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.spec import MicroBatchPart, MoESpec, RunSpec
from mhmoe_ray.spec.cluster import DEFAULT_SHARD_CACHE, ShardCacheSpec
from mhmoe_ray.storage import Location


class TrainingSamples:
    """Random access to training samples by position."""

    def __init__(self, spec: RunSpec, samples_before: Mapping[str, int] | None = None) -> None:
        self._spec, self._manifest = spec, require_data_manifest(spec.data.prepared)
        self._names, self._order = training_order(spec, self._manifest, samples_before)
        self.token_bytes = self._manifest.token_bytes
        self.has_pairs = bool(spec.data.pair_sources)
        self._expert_numbers = domain_experts(spec.model.moe, self._names)
        shards = [self._manifest.domains[name].shards for name in self._names]
        plan = plan_cache(spec.data.prepared, self._manifest, spec.cluster.shard_cache)
        self._readers = [ShardReader(spec.data.prepared, s, self.token_bytes, plan) for s in shards]

    @staticmethod
    def open_cached(spec: RunSpec, samples_before: Mapping[str, int] | None = None) -> "TrainingSamples":
        """Return the samples of a spec; a process caches them for its next tasks."""
        return _open_samples(spec.model_dump_json(), tuple(sorted((samples_before or {}).items())))

    def locate_sample(self, position: int) -> tuple[str, int]:
        """Return the domain of the sample at `position` and the sample's number in it."""
        return self.locate_samples([position])[0]

    def locate_samples(self, positions: Sequence[int]) -> list[tuple[str, int]]:
        """Return the domain of the sample at each position, and the sample's number in it."""
        domains, samples = self._order(np.array(positions, np.int64))
        return [(self._names[domain], sample) for domain, sample in zip(domains, samples.tolist(), strict=True)]

    def experts(self, positions: np.ndarray) -> np.ndarray | None:
        """Return the expert of each position for router `domain`, or None."""
        return None if self._expert_numbers is None else self._expert_numbers[self._order(positions)[0]]

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """Return the number of each sample among those of all domains, in the order of the data manifest."""
        domains, numbers = self._order(positions)
        counts = {name: domain.samples for name, domain in self._manifest.domains.items()}
        firsts = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
        return np.array([firsts[name] for name in self._names], np.int64)[domains] + numbers

    def _by_domain(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, ShardReader, np.ndarray]]:
        """Yield the indices of each domain's samples in `positions`, the domain's reader, and their numbers in it."""
        domains, numbers = self._order(positions)
        for domain in np.unique(domains):
            indices = np.flatnonzero(domains == domain)
            yield indices, self._readers[domain], numbers[indices]

    def read(self, positions: np.ndarray) -> Samples:
        """Return stored samples of a decoder, in which the largest token value marks padding (see `to_model_samples`).

        If any source has conversations, all samples get their columns.
        """
        chat, rows = self._manifest.chat, None
        for indices, reader, numbers in self._by_domain(positions):
            domain_rows = reader.read(numbers)
            if chat is not None:
                domain_rows = with_all_columns(domain_rows, chat.start_token, padding_token(self.token_bytes))
            if rows is None:
                rows = np.empty((len(positions), domain_rows.shape[1]), domain_rows.dtype)
            rows[indices] = domain_rows
        assert rows is not None
        return rows

    def read_micro_batch(self, number: int) -> dict[str, Any]:
        """Return a micro-batch of a family whose rows are micro-batches: the samples of each part by its name."""
        samples, first_position = {}, number * self._spec.train.micro_batch_size
        for part in self._spec.parts:
            positions = first_position + np.arange(part.samples)
            first_position += part.samples
            # The labels make a sample's random choices depend on its position in the training alone.
            labels = [f"{part.name} {position}" for position in positions]
            samples[part.name] = self._maker.make(part, self._read_stored(positions), labels, crops=True)
        return samples

    def _read_stored(self, positions: np.ndarray) -> StoredColumns:
        values: dict[str, list[Any]] = {name: [None] * len(positions) for name in self._maker.columns}
        for indices, reader, numbers in self._by_domain(positions):
            for name, column in values.items():
                for index, value in zip(indices, reader.read_column(name, numbers), strict=True):
                    column[index] = value
        return {name: np.stack(column) if name == TOKENS else column for name, column in values.items()}

    @cached_property
    def _maker(self) -> PartSampleMaker:
        return data_of(self._spec.model).sample_maker(self._spec, self._manifest)


# The argument is JSON, since a cache needs hashable arguments and a spec is not hashable.
@lru_cache(maxsize=2)
def _open_samples(spec_json: str, samples_before: tuple[tuple[str, int], ...]) -> TrainingSamples:
    return TrainingSamples(RunSpec.model_validate_json(spec_json), dict(samples_before))


def domain_experts(moe: MoESpec | None, names: Sequence[str]) -> np.ndarray | None:
    """Return each domain's expert, or -1 without one; None if the router is not `domain`."""
    if moe is None or moe.router != "domain":
        return None
    numbers = (moe.expert_of_domain(name) for name in names)
    return np.array([-1 if number is None else number for number in numbers], np.int64)


def held_out_reader(folder: Location, manifest: DataManifest, cache: ShardCacheSpec) -> ShardReader:
    """Return the reader of the held-out samples, which are stored domain after domain in the manifest's order."""
    plan = plan_cache(folder, manifest, cache)
    return ShardReader(folder, manifest.validation, manifest.token_bytes, plan)


def validation_samples(
    folder: Location,
    manifest: DataManifest,
    moe: MoESpec | None = None,
    sources: Collection[str] | None = None,
    cache: ShardCacheSpec = DEFAULT_SHARD_CACHE,
) -> ModelSamples:
    """Return the validation samples of a prepared folder, of `sources` if given, in the form that a model takes.

    With router `domain` in `moe`, samples of domains without an expert are left out.
    """
    reader = held_out_reader(folder, manifest, cache)
    samples = to_model_samples(reader.read(np.arange(len(reader))), manifest.token_bytes)
    # Validation samples are stored domain after domain in the manifest's order.
    counts = [domain.validation_samples for domain in manifest.domains.values()]
    is_kept = np.repeat([sources is None or source_of(name) in sources for name in manifest.domains], counts)
    numbers = domain_experts(moe, list(manifest.domains))
    experts = None if numbers is None else np.repeat(numbers, counts)
    if experts is not None:
        is_kept &= experts >= 0
    document_starts, experts = (
        None if column is None else column[is_kept] for column in (samples.document_starts, experts)
    )
    return ModelSamples(samples.token_ids[is_kept], samples.target_mask[is_kept], document_starts, experts)


class StoredValues(Sequence[Any]):
    """A column of some stored samples, which are read when they are accessed."""

    def __init__(self, reader: ShardReader, column: str, numbers: np.ndarray) -> None:
        self._reader, self._column, self._numbers = reader, column, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        values = self._reader.read_column(self._column, np.atleast_1d(self._numbers[index]))
        return values if isinstance(index, slice) else values[0]


class HeldOutSamples:
    """Held-out samples of one part, made on access, with the same random choices and without random crops each time."""

    def __init__(self, maker: PartSampleMaker, part: MicroBatchPart, stored: StoredColumns) -> None:
        self._maker, self._part, self._stored = maker, part, stored

    @property
    def sample_count(self) -> int:
        """The number of held-out samples of the part."""
        return len(next(iter(self._stored.values())))

    def rows(self, start: int, stop: int) -> Any:
        """Return samples `start` to `stop` - 1 of the part."""
        stored = {name: values[start:stop] for name, values in self._stored.items()}
        labels = [f"validation {self._part.name} {number}" for number in range(start, stop)]
        return self._maker.make(self._part, stored, labels, crops=False)


def stored_held_out(spec: RunSpec, manifest: DataManifest, columns: Sequence[str]) -> dict[str, StoredColumns]:
    """Return columns of the held-out samples of each part that has any, by its name; they are read on access."""
    reader = held_out_reader(spec.data.prepared, manifest, spec.cluster.shard_cache)
    # Validation samples are stored domain after domain in the manifest's order.
    counts = [domain.validation_samples for domain in manifest.domains.values()]
    sources = np.repeat([source_of(name) for name in manifest.domains], counts)
    numbers = {part.name: np.flatnonzero(np.isin(sources, part.sources)) for part in spec.parts}
    return {
        part: {name: StoredValues(reader, name, rows) for name in columns}
        for part, rows in numbers.items()
        if len(rows)
    }


def held_out_samples(spec: RunSpec, manifest: DataManifest) -> dict[str, HeldOutSamples]:
    """Return the held-out samples of each part of micro-batches that has any, by its name, if `has_rows`."""
    maker, parts = data_of(spec.model).sample_maker(spec, manifest), {part.name: part for part in spec.parts}
    stored = stored_held_out(spec, manifest, maker.columns)
    return {name: HeldOutSamples(maker, parts[name], columns) for name, columns in stored.items()}
