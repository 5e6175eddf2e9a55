"""The Ray dataset of a batch inference: a task reads the chunks of rows without answers, and workers answer them.

Ray computes the chunks of a killed worker again. It also repeats a killed reading task, so the chunks that the task
yields must depend only on its arguments.
"""

import pickle
from collections.abc import Collection, Iterator
from functools import partial

import pyarrow as pa
import ray
import ray.data

from mhmoe_ray.errors import JobError, MhmoeError
from mhmoe_ray.serving.batch.formats import FORMATS
from mhmoe_ray.serving.batch.input import open_input
from mhmoe_ray.serving.batch.output import BatchOutput
from mhmoe_ray.serving.batch.request import BatchRequest
from mhmoe_ray.serving.batch.worker import BLOCK_COLUMN, ChunkResult, ChunkWorker, RowChunk, as_block, chunks_at_a_time
from mhmoe_ray.spec import ServeSpec

CHUNK_RETRIES = 5
"""Number of times that Ray Data repeats a chunk whose worker died.

Without a limit, rows that need too much memory would kill workers without end.
"""


def answer_chunks(
    request: BatchRequest, missing_chunks: Collection[int], output: BatchOutput, spec: ServeSpec, workers: int
) -> Iterator[ChunkResult]:
    """Answer chunks of input rows, and yield the result of each once its file is in the output folder, in any order.

    A failed chunk, or workers that died too often, are an MhmoeError.
    """
    read = partial(read_chunks, request=request, missing_chunks=frozenset(missing_chunks))
    at_a_time = chunks_at_a_time(request, spec)
    pool = ray.data.ActorPoolStrategy(
        size=workers,
        max_concurrent_calls_per_actor=at_a_time,
        # A worker holds no more chunks than it computes at a time. A further chunk could wait in a busy worker while
        # another worker is idle.
        max_tasks_in_flight_per_actor=at_a_time,
        enable_true_multi_threading=True,
    )
    dataset = ray.data.from_arrow(pa.table({"input": [request.input.path]}))
    # Each chunk is a block of its own, because Ray Data gives whole blocks to workers. Progress bars would fill the
    # job's log. A chunk may take long, and workers may wait long for room on the cluster, so there is no timeout.
    dataset.context.target_max_block_size = 1
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = -1
    chunks = dataset.map_batches(read, batch_format="pyarrow", batch_size=1, num_cpus=0)
    results = chunks.map_batches(
        ChunkWorker,
        fn_constructor_kwargs={"request": request, "spec": spec, "output": output},
        batch_format="pyarrow",
        batch_size=1,
        compute=pool,
        num_cpus=spec.cpus_per_replica,
        num_gpus=spec.gpus_per_replica,
        max_task_retries=CHUNK_RETRIES,
    )
    try:
        for row in results.iter_rows():
            result: ChunkResult = pickle.loads(row[BLOCK_COLUMN])
            if result.error:
                raise result.error
            yield result
    except (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError) as e:
        reason = f"a worker died, and so did {CHUNK_RETRIES} that computed the same chunk again: {_first_line(e)}"
        fix = "give workers more memory (fewer of them, or a lower serve.max_concurrency), then give the command again"
        raise JobError("the workers", reason, fix) from e


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def read_chunks(_: pa.Table, *, request: BatchRequest, missing_chunks: frozenset[int]) -> Iterator[pa.Table]:
    """Read the input, and yield each missing chunk as a block; if reading fails, the last block has the error.

    Ray Data calls this once, for a table of one row.
    """
    last_chunk = max(missing_chunks)
    number = 0
    try:
        source = open_input(request.input.path)
        for number, rows in enumerate(FORMATS[source.format].read_tables(source, request.chunk_rows)):
            if number in missing_chunks:
                yield as_block(RowChunk.of_table(number, rows))
            if number == last_chunk:
                return
    except MhmoeError as e:
        yield as_block(RowChunk(number, b"", e))
