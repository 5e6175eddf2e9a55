"""The training samples as a Ray Dataset in the order of order/order.py.

Micro-batch j of rank r, in a world of w ranks, is micro-batch j * w + r of the training. Ray's
`streaming_split(equal=True)` hands blocks of equal size to the ranks in turn, so a block holds the next n micro-batches
of one rank. A block costs Ray some milliseconds at any size, so n is large in a long training:

    w = 2, n = 3     | 0 2 4 | 1 3 5 | 6 8 10 | 7 9 11 | ...

Every row carries its position, so a worker notices rows of another rank at once.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data

from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.ray_compat import ExecutionCallback
from mhmoe_ray.spec import RunSpec

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

    The columns are `position` (int64) and those of the family (`FamilyData.stream_columns`). A row is a sample, or a
    whole micro-batch with the position of its first sample. Blocks may extend past the end of the training. The caller
    must read the dataset with `preserve_order`. `samples_before` is that of `compute_mixture`.
    """
    data, b = data_of(spec.model), spec.train.micro_batch_size
    row_samples = b if data.has_rows else 1
    rows = (spec.train.steps * spec.samples_per_step - start) // row_samples
    micro_batch_bytes, micro_batch_rows = data.micro_batch_bytes(spec), b // row_samples
    # A short training has small blocks, so that each rank gets at least one block.
    micro_batches = max(
        1, min(MAX_MICRO_BATCHES, BLOCK_BYTES // micro_batch_bytes, rows // (micro_batch_rows * world_size))
    )
    layout = StreamLayout(world_size, micro_batch_rows, micro_batches)
    # Each rank gets equally many blocks, and at least one: if a worker is killed after the last step, before all have
    # ended, the restarted ones begin at the end and read nothing.
    rounds = max(1, -(-rows // (layout.block_rows * layout.world_size)))
    block_count = rounds * layout.world_size
    size = task_blocks(block_count, micro_batches * micro_batch_bytes)
    tables = min(MAX_TABLES, -(-block_count // size))
    # The block numbers are given as tables, because `ray.data.range` would start additional tasks to make them.
    block_numbers = ray.data.from_arrow(
        [pa.table({"block": numbers}) for numbers in np.array_split(np.arange(block_count), tables)]
    )
    if block_count > tables * size:
        # If there are more tasks than tables, the tables must be cut. Tasks of Ray Data do this little by little.
        block_numbers = block_numbers.repartition(target_num_rows_per_block=size)
    read_rows = partial(
        _read_rows, spec=spec, samples_before=samples_before, layout=layout, start=start // row_samples, rows=rows
    )
    # The rows of a task fill whole blocks, so the repartition cuts them exactly into blocks. A strict repartition would
    # join the rows of several tasks.
    stream = block_numbers.map_batches(read_rows, batch_size=1 if data.has_rows else BLOCKS_PER_TASK).repartition(
        target_num_rows_per_block=layout.block_rows
    )
    # Ray Data would otherwise collect 128 MB of a task's rows before it cuts the first block from them.
    stream.context.target_max_block_size = BLOCK_BYTES
    # Progress bars would fill the job's log.
    stream.context.enable_progress_bars = False
    stream.context.custom_execution_callback_classes = [PausingCallback]
    return stream


def task_blocks(block_count: int, block_bytes: int) -> int:
    """Return the largest number of blocks that one task makes."""
    return min(max(BLOCKS_PER_TASK, -(-block_count // MAX_TABLES)), max(1, MAX_TASK_BYTES // block_bytes))


def _read_rows(
    batch: dict[str, np.ndarray],
    *,
    spec: RunSpec,
    samples_before: Mapping[str, int] | None,
    layout: StreamLayout,
    start: int,
    rows: int,
) -> dict[str, Any]:
    numbers = start + layout.positions(layout.rows(batch["block"]))
    data, samples = data_of(spec.model), TrainingSamples.open_cached(spec, samples_before)
    row_samples = spec.train.micro_batch_size if data.has_rows else 1
    # No rank reads the rows past the end, so any existing row can fill them.
    columns = data.stream_columns(samples, np.minimum(numbers, start + rows - 1))
    return {"position": numbers * row_samples, **columns}
