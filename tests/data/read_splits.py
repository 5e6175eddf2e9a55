"""Reader of a training stream that is split over workers as Ray Train splits it."""

import threading

import ray.data

from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.objectives.next_token import sample_digest


def read_splits(spec: RunSpec, world_size: int, start_position: int) -> list[list[tuple[list[int], int]]]:
    """Read a training stream with one thread for each worker, and return the micro-batches of each worker.

    A micro-batch is a pair: the positions of its samples in the training, and the digest of its tokens. Ray must be
    running.
    """
    stream = training_stream(spec, start_position, world_size)
    stream.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    batches_by_rank: list[list[tuple[list[int], int]]] = [[] for _ in range(world_size)]

    def read_split(rank, split):
        for batch in split.iter_batches(batch_size=spec.train.micro_batch_size, batch_format="numpy"):
            batches_by_rank[rank].append((batch["position"].tolist(), sample_digest(batch["tokens"])))

    threads = [
        threading.Thread(target=read_split, args=(rank, split))
        for rank, split in enumerate(stream.streaming_split(world_size, equal=True))
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return batches_by_rank
