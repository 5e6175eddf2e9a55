"""Read a training stream as Ray Train would split it over workers."""

import threading

import ray.data

from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.worker import sample_digest


def read_splits(spec: RunSpec, world: int, start: int) -> list[list[tuple[list[int], int]]]:
    """Return the positions and the digest of each batch, by worker.

    It needs a running Ray.
    """
    stream = training_stream(spec, start, world)
    stream.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    found: list[list[tuple[list[int], int]]] = [[] for _ in range(world)]

    def read(rank, split):
        for batch in split.iter_batches(batch_size=spec.train.micro_batch_size, batch_format="numpy"):
            found[rank].append((batch["position"].tolist(), sample_digest(batch["tokens"])))

    threads = [
        threading.Thread(target=read, args=(rank, split))
        for rank, split in enumerate(stream.streaming_split(world, equal=True))
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found
