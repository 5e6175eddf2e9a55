"""Stream of training samples as a Ray Dataset in the order of order/order.py, and the fixed validation samples.

Rank r of a world of w reads, as its j-th micro-batch, micro-batch j * w + r of the training. Ray's
`streaming_split(equal=True)` deals blocks to ranks in turn if the order is preserved and all blocks have the same size.
A block therefore holds the next n micro-batches of one rank. It holds many of them where it can, because each block
costs Ray some milliseconds, whatever its size:

    w = 2, n = 3     | 0 2 4 | 1 3 5 | 6 8 10 | 7 9 11 | ...

Every row carries its position, so that a worker notices at once if it receives the rows of another rank.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray.data

from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.shards.files import Samples, ShardReader, split_padding, token_dtype
from mhmoe_ray.data.shards.manifest import DataManifest, require_data_manifest
from mhmoe_ray.spec import RunSpec

BLOCK_BYTES = 1 << 20
MOST_IN_A_BLOCK = 32
"""Largest number of micro-batches in a block; more would not be faster, and the first step waits for a block of each
rank."""
BLOCKS_PER_TASK = 16
MAX_TASKS = 2_000  # Ray makes them all at the start; a longer run has longer ones, which yield as they go


class Deal(NamedTuple):
    """Mapping from the rows of a stream, in the order of its blocks, to samples of the training."""

    world: int
    micro_batch: int
    """Samples per micro-batch, b."""
    in_block: int
    """Micro-batches per block, n."""

    @property
    def block_rows(self) -> int:
        return self.in_block * self.micro_batch

    def position(self, row: np.ndarray) -> np.ndarray:
        """Return the position of each row's sample; rows and positions both count from the start of the stream."""
        turn, within = np.divmod(row, self.block_rows)
        number, sample = np.divmod(within, self.micro_batch)
        round_, rank = np.divmod(turn, self.world)
        return ((round_ * self.in_block + number) * self.world + rank) * self.micro_batch + sample


def training_stream(spec: RunSpec, start: int, world: int) -> ray.data.Dataset:
    """Return a dataset of samples `start` .. steps * M * b - 1 for `world` ranks.

    The last block of each rank may go on past that end; no rank reads those rows. Columns: `position` int64, `tokens`
    (T + 1) unsigned integers. The caller must read it with `preserve_order`.
    """
    rows = spec.train.steps * spec.samples_per_step - start
    b = spec.train.micro_batch_size
    # Four bytes a token at most.
    in_block = max(1, min(MOST_IN_A_BLOCK, BLOCK_BYTES // (4 * b * (spec.data.seq_len + 1)), rows // (b * world)))
    deal = Deal(world, b, in_block)
    rounds = -(-rows // (deal.block_rows * world))
    per_task = BLOCKS_PER_TASK * deal.block_rows
    whole = rounds * world * deal.block_rows
    positions = ray.data.range(whole, override_num_blocks=min(MAX_TASKS, -(-whole // per_task)))
    read = partial(_read_rows, spec=spec, deal=deal, start=start, end=start + rows)
    blocks = positions.map_batches(read, batch_size=per_task)
    stream = blocks.repartition(target_num_rows_per_block=deal.block_rows, strict=True)
    stream.context.enable_progress_bars = False  # they would fill the job's log
    return stream


def _read_rows(batch: dict[str, np.ndarray], *, spec: RunSpec, deal: Deal, start: int, end: int) -> dict[str, Any]:
    position = start + deal.position(batch["id"])
    # Past the end no rank reads; any sample will do.
    return {"position": position, "tokens": TrainingSamples.open(spec).read(np.minimum(position, end - 1))}


class TrainingSamples:
    """Random access to training samples by their position."""

    def __init__(self, spec: RunSpec) -> None:
        folder = spec.data.prepared
        manifest = require_data_manifest(folder)
        self._names, self._order = training_order(spec, manifest)
        self.token_bytes = manifest.token_bytes
        """Bytes per token, 2 or 4, as in `DataManifest`."""
        self._readers = [ShardReader(folder, manifest.domains[n].shards, self.token_bytes) for n in self._names]

    @staticmethod
    def open(spec: RunSpec) -> "TrainingSamples":
        """Return the samples of a spec; they stay open within a process, since tasks come back for the next
        positions."""
        return _open(spec.model_dump_json())

    def place(self, position: int) -> tuple[str, int]:
        """Return the domain of the sample at `position`, and the sample's number within that domain."""
        domain, sample = self._order(np.array([position]))
        return self._names[domain[0]], int(sample[0])

    def read(self, position: np.ndarray) -> np.ndarray:
        """Return the samples at these positions as (positions, T + 1) token ids.

        They are unsigned integers as stored, with padding marked; `split_padding` converts them for a model.
        """
        domain, sample = self._order(position)
        rows: np.ndarray | None = None
        for d in np.unique(domain):
            wanted = domain == d
            tokens = self._readers[d].read(sample[wanted])
            if rows is None:
                rows = np.empty((len(position), tokens.shape[1]), token_dtype(self.token_bytes))
            rows[wanted] = tokens
        assert rows is not None
        return rows


@lru_cache(maxsize=2)
def _open(spec_json: str) -> TrainingSamples:
    return TrainingSamples(RunSpec.model_validate_json(spec_json))


def validation_samples(folder: Path, manifest: DataManifest) -> tuple[Samples, np.ndarray]:
    """Return all held-out samples, and a mask of the targets that count.

    Samples are (samples, T + 1) with padding replaced by token 0; the mask is (samples, T).
    """
    reader = ShardReader(folder, manifest.validation, manifest.token_bytes)
    return split_padding(reader.read(np.arange(len(reader))), manifest.token_bytes)
