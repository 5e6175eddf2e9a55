"""Reads a training stream as Ray Train would split it over workers; prints positions and digests per worker.

Run as `python -m tests.data.read_splits SPEC WORLD:START ...` as a job; prints one line of JSON.
"""

import json
import sys
import threading
from pathlib import Path

import ray
import ray.data

from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.spec import RunSpec, load_resolved_spec
from mhmoe_ray.train.digest import sample_digest


def read_splits(spec: RunSpec, world: int, start: int) -> list[list[tuple[list[int], int]]]:
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


def main() -> None:
    spec = load_resolved_spec(Path(sys.argv[1]))
    ray.init(log_to_driver=False)
    print(json.dumps({pair: read_splits(spec, *map(int, pair.split(":"))) for pair in sys.argv[2:]}), flush=True)


if __name__ == "__main__":
    main()
