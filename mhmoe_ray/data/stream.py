"""The training samples as a Ray Dataset in the order of order/order.py, and the fixed validation samples.

Micro-batch j of rank r, in a world of w ranks, is micro-batch j * w + r of the training. Ray's
`streaming_split(equal=True)` hands blocks of equal size to the ranks in turn, so a block holds the next n micro-batches
of one rank. A block costs Ray some milliseconds at any size, so n is large in a long training:

    w = 2, n = 3     | 0 2 4 | 1 3 5 | 6 8 10 | 7 9 11 | ...

Every row carries its position, so a worker notices rows of another rank at once.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.shards.columns import (
    EXPERT,
    ModelSamples,
    Samples,
    columns_of,
    padding_token,
    to_model_samples,
    with_all_columns,
)
from mhmoe_ray.data.shards.files import ShardReader
from mhmoe_ray.data.shards.manifest import DataManifest, require_data_manifest
from mhmoe_ray.ray_compat import ExecutionCallback
from mhmoe_ray.spec import MoESpec, RunSpec

BLOCK_BYTES = 1 << 20
MAX_MICRO_BATCHES = 32
"""Largest number of micro-batches in a block. Larger blocks are no faster and delay the first step."""
BLOCKS_PER_TASK = 16
"""Blocks that one Ray task makes, one after another; more in a long run (`task_blocks`)."""
MAX_TABLES = 2_000
"""Largest number of tables of block numbers, the tasks' input. Ray stores all at the start, in some milliseconds
each."""
MAX_TASK_BYTES = 512 << 20
"""Largest bytes of all blocks of a task. They wait in Ray's object store until earlier tasks' are consumed; without
room for them, only the first running task would go on."""
ReadRows = Callable[[dict[str, np.ndarray]], dict[str, Any]]
LOOP_PAUSE_SECONDS = 0.03
"""Pause between steps of Ray Data's scheduling loop, each some milliseconds of CPU time; 10 ms would keep a sixth of a
core busy."""


class PausingCallback(ExecutionCallback):  # type: ignore[misc]  # a name of `ray_compat` has type Any
    """Callback that pauses Ray Data's scheduling loop, which would keep half a core busy while tasks wait."""

    def on_execution_step(self, executor: object) -> None:
        time.sleep(LOOP_PAUSE_SECONDS)


class StreamLayout(NamedTuple):
    """Layout of the stream: the rows of each block, and the position of each row."""

    world_size: int
    micro_batch_size: int
    """Rows of a micro-batch, b; 1 if each row is a whole micro-batch."""
    micro_batches: int
    """Micro-batches of a block, n."""

    @property
    def block_rows(self) -> int:
        """Number of rows in a block."""
        return self.micro_batches * self.micro_batch_size

    def rows(self, blocks: np.ndarray) -> np.ndarray:
        """Return the numbers of all rows in some blocks, one block after another."""
        return np.asarray((blocks[:, np.newaxis] * self.block_rows + np.arange(self.block_rows)).ravel())

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Return the position of the sample in each row."""
        block, row_in_block = np.divmod(rows, self.block_rows)
        batch_in_block, sample = np.divmod(row_in_block, self.micro_batch_size)
        block_round, rank = np.divmod(block, self.world_size)
        return (
            (block_round * self.micro_batches + batch_in_block) * self.world_size + rank
        ) * self.micro_batch_size + sample


def training_stream(
    spec: RunSpec, start: int, world_size: int, samples_before: Mapping[str, int] | None = None
) -> ray.data.Dataset:
    """Return a dataset of the training samples from position `start` on, in blocks for `world_size` ranks in turn.

    The columns are `position` (int64), those of the samples (data/shards/columns.py), and `expert` (int64) with router
    `domain`. For an encoder or a vision model, a row is a whole micro-batch and has the position of its first sample
    (encoder/samples.py, vision/samples.py). Blocks may extend past the end of the training. The caller must read the
    dataset with `preserve_order`. `samples_before` is that of `compute_mixture`.
    """
    if data_of(spec.model).has_rows:
        return _micro_batch_stream(spec, start // spec.train.micro_batch_size, world_size)
    rows = spec.train.steps * spec.samples_per_step - start
    b = spec.train.micro_batch_size
    # A token takes at most four bytes. A short training has small blocks, so that each rank gets at least one block.
    micro_batches = max(
        1, min(MAX_MICRO_BATCHES, BLOCK_BYTES // (4 * b * (spec.data.seq_len + 1)), rows // (b * world_size))
    )
    layout = StreamLayout(world_size, b, micro_batches)
    read_rows = partial(
        _read_rows, spec=spec, samples_before=samples_before, layout=layout, start=start, end=start + rows
    )
    return _stream_of_blocks(read_rows, layout, rows, BLOCK_BYTES, blocks_per_call=BLOCKS_PER_TASK)


def task_blocks(block_count: int, block_bytes: int) -> int:
    """Return the largest number of blocks that one task makes."""
    return min(max(BLOCKS_PER_TASK, -(-block_count // MAX_TABLES)), max(1, MAX_TASK_BYTES // block_bytes))


def _stream_of_blocks(
    read_rows: ReadRows, layout: StreamLayout, rows: int, block_bytes: int, *, blocks_per_call: int
) -> ray.data.Dataset:
    """Return a stream of at least `rows` rows, with equally many blocks for each rank.

    `read_rows` maps block numbers (column `block`) to the columns of their rows.
    """
    rounds = -(-rows // (layout.block_rows * layout.world_size))
    block_count = rounds * layout.world_size
    size = task_blocks(block_count, block_bytes)
    tables = min(MAX_TABLES, -(-block_count // size))
    # The block numbers are given as tables, because `ray.data.range` would start additional tasks to make them.
    block_numbers = ray.data.from_arrow(
        [pa.table({"block": numbers}) for numbers in np.array_split(np.arange(block_count), tables)]
    )
    if block_count > tables * size:
        # If there are more tasks than tables, the tables must be cut. Tasks of Ray Data do this little by little.
        block_numbers = block_numbers.repartition(target_num_rows_per_block=size)
    # The rows of a task fill whole blocks, so the repartition cuts them exactly into blocks. A strict repartition would
    # join the rows of several tasks.
    stream = block_numbers.map_batches(read_rows, batch_size=blocks_per_call).repartition(
        target_num_rows_per_block=layout.block_rows
    )
    # Ray Data would otherwise collect 128 MB of a task's rows before it cuts the first block from them.
    stream.context.target_max_block_size = BLOCK_BYTES
    # Progress bars would fill the job's log.
    stream.context.enable_progress_bars = False
    stream.context.custom_execution_callback_classes = [PausingCallback]
    return stream


def _read_rows(
    batch: dict[str, np.ndarray],
    *,
    spec: RunSpec,
    samples_before: Mapping[str, int] | None,
    layout: StreamLayout,
    start: int,
    end: int,
) -> dict[str, Any]:
    positions = start + layout.positions(layout.rows(batch["block"]))
    samples = TrainingSamples.open_cached(spec, samples_before)
    # No rank reads the rows past the end, so any existing sample can fill them.
    existing_positions = np.minimum(positions, end - 1)
    columns = {"position": positions, **columns_of(samples.read(existing_positions))}
    experts = samples.experts(existing_positions)
    return columns if experts is None else {**columns, EXPERT: experts}


def _micro_batch_stream(spec: RunSpec, start: int, world_size: int) -> ray.data.Dataset:
    rows = spec.train.steps * spec.train.micro_batches - start
    micro_batch_bytes = data_of(spec.model).micro_batch_bytes(spec)
    block_rows = max(1, min(MAX_MICRO_BATCHES, BLOCK_BYTES // micro_batch_bytes, rows // world_size))
    layout = StreamLayout(world_size, 1, block_rows)
    read_rows = partial(_read_micro_batches, spec=spec, layout=layout, start=start, end=start + rows)
    return _stream_of_blocks(read_rows, layout, rows, block_rows * micro_batch_bytes, blocks_per_call=1)


def _read_micro_batches(
    batch: dict[str, np.ndarray], *, spec: RunSpec, layout: StreamLayout, start: int, end: int
) -> dict[str, Any]:
    # No rank reads the rows past the end, so any existing micro-batch can fill them.
    numbers = np.minimum(start + layout.positions(layout.rows(batch["block"])), end - 1)
    data = data_of(spec.model)
    samples = data.training_samples(spec)
    columns = data.stream_columns([samples.read(int(number)) for number in numbers])
    return {"position": numbers * spec.train.micro_batch_size, **columns}


class TrainingSamples:
    """Random access to training samples by position."""

    def __init__(self, spec: RunSpec, samples_before: Mapping[str, int] | None = None) -> None:
        folder = spec.data.prepared
        manifest = require_data_manifest(folder)
        self._names, self._order = training_order(spec, manifest, samples_before)
        self.token_bytes = manifest.token_bytes
        self._chat = manifest.chat
        self._expert_numbers = domain_experts(spec.model.moe, self._names)
        self._shard_readers = [ShardReader(folder, manifest.domains[n].shards, self.token_bytes) for n in self._names]

    @staticmethod
    def open_cached(spec: RunSpec, samples_before: Mapping[str, int] | None = None) -> "TrainingSamples":
        """Return the samples of a spec; a process caches them for its next tasks."""
        return _open_samples(spec.model_dump_json(), tuple(sorted((samples_before or {}).items())))

    def locate_sample(self, position: int) -> tuple[str, int]:
        """Return the domain of the sample at `position` and the sample's number in it."""
        domains, samples = self._order(np.array([position]))
        return self._names[domains[0]], int(samples[0])

    def experts(self, positions: np.ndarray) -> np.ndarray | None:
        """Return the expert of each position for router `domain`, or None."""
        return None if self._expert_numbers is None else self._expert_numbers[self._order(positions)[0]]

    def read(self, positions: np.ndarray) -> Samples:
        """Return stored samples, in which the largest token value marks padding (see `to_model_samples`).

        If any source has conversations, all samples get their columns.
        """
        domains, samples = self._order(positions)
        rows: Samples | None = None
        for d in np.unique(domains):
            is_in_domain = domains == d
            domain_rows = self._shard_readers[d].read(samples[is_in_domain])
            if self._chat is not None:
                domain_rows = with_all_columns(domain_rows, self._chat.start_token, padding_token(self.token_bytes))
            if rows is None:
                rows = np.empty((len(positions), domain_rows.shape[1]), domain_rows.dtype)
            rows[is_in_domain] = domain_rows
        assert rows is not None
        return rows


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


def validation_samples(
    folder: Path, manifest: DataManifest, moe: MoESpec | None = None, sources: Collection[str] | None = None
) -> ModelSamples:
    """Return the validation samples of a prepared folder, of `sources` if given, in the form that a model takes.

    With router `domain` in `moe`, samples of domains without an expert are left out.
    """
    reader = ShardReader(folder, manifest.validation, manifest.token_bytes)
    samples = to_model_samples(reader.read(np.arange(len(reader))), manifest.token_bytes)
    # Validation samples are stored domain after domain in the manifest's order.
    counts = [domain.validation_samples for domain in manifest.domains.values()]
    is_kept = np.repeat([sources is None or source_of(name) in sources for name in manifest.domains], counts)
    numbers = domain_experts(moe, list(manifest.domains))
    experts = None if numbers is None else np.repeat(numbers, counts)
    if experts is not None:
        is_kept &= experts >= 0
    if is_kept.all():
        return samples._replace(experts=experts)
    document_starts, experts = (
        None if column is None else column[is_kept] for column in (samples.document_starts, experts)
    )
    return ModelSamples(samples.token_ids[is_kept], samples.target_mask[is_kept], document_starts, experts)
