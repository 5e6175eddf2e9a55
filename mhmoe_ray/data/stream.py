"""Training samples as a Ray Dataset in the order of order.py, and the fixed validation micro-batches.

Rank r of a world of w reads, as its j-th micro-batch, micro-batch j * w + r of the training. This holds for Ray's
`streaming_split(equal=True)` when blocks have exactly b rows and order is preserved; every row carries its position, so
that a worker can tell at once if it did not.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.shards.files import Samples, ShardReader, split_padding
from mhmoe_ray.data.shards.manifest import DataManifest, require_data_manifest
from mhmoe_ray.spec import RunSpec

MICRO_BATCHES_PER_TASK = 32
MAX_TASKS = 2_000  # Ray makes them all at the start; a longer run has longer ones, which yield as they go


def training_stream(spec: RunSpec, start: int) -> ray.data.Dataset:
    """Samples `start` .. steps * M * b - 1 in blocks of one micro-batch.

    Columns: `position` int64, `tokens` (T + 1) unsigned integers. Read it with `preserve_order`.
    """
    rows = spec.train.steps * spec.samples_per_step - start
    b = spec.train.micro_batch_size
    per_task = MICRO_BATCHES_PER_TASK * b
    blocks = min(MAX_TASKS, -(-rows // per_task))
    read = partial(_read_positions, spec=spec, start=start)
    positions = ray.data.range(rows, override_num_blocks=blocks)
    stream = positions.map_batches(read, batch_size=per_task).repartition(target_num_rows_per_block=b, strict=True)
    stream.context.enable_progress_bars = False  # they would fill the job's log
    return stream


def _read_positions(batch: dict[str, np.ndarray], *, spec: RunSpec, start: int) -> dict[str, Any]:
    position = batch["id"] + start
    return {"position": position, "tokens": TrainingSamples.open(spec).read(position)}


class TrainingSamples:
    """Any training sample by its position."""

    def __init__(self, spec: RunSpec) -> None:
        folder = spec.data.prepared
        manifest = require_data_manifest(folder)
        names, self._order = training_order(spec, manifest)
        self._readers = [ShardReader(folder, manifest.domains[n].shards, manifest.token_bytes) for n in names]
        self._dtype = np.dtype(f"u{manifest.token_bytes}")

    @staticmethod
    def open(spec: RunSpec) -> "TrainingSamples":
        """Kept open within a process, since tasks come back for the next positions."""
        return _open(spec.model_dump_json())

    def read(self, position: np.ndarray) -> np.ndarray:
        """(positions, T + 1) token ids as stored, unsigned; `split_padding` is for them."""
        domain, sample = self._order(position)
        rows: np.ndarray | None = None
        for d in np.unique(domain):
            wanted = domain == d
            tokens = self._readers[d].read(sample[wanted])
            if rows is None:
                rows = np.empty((len(position), tokens.shape[1]), self._dtype)
            rows[wanted] = tokens
        assert rows is not None
        return rows


@lru_cache(maxsize=2)
def _open(spec_json: str) -> TrainingSamples:
    return TrainingSamples(RunSpec.model_validate_json(spec_json))


def validation_samples(folder: Path, manifest: DataManifest) -> tuple[Samples, np.ndarray]:
    """All held-out samples (samples, T + 1), padding as token 0; and the targets that count, a mask (samples, T)."""
    reader = ShardReader(folder, manifest.validation, manifest.token_bytes)
    return split_padding(reader.read(np.arange(len(reader))), manifest.token_bytes)
