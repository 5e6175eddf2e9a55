"""Our own preparation and stream."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from mhmoe_ray.bench.ingest.memory import Peak
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.spec import RunSpec


def prepare_ours(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """The whole of `mhmoe data prepare`, quarantine, held-out documents and baselines included.

    Args:
        spec: whose sources are read, with a given tokenizer.
        folder: empty, for what it writes.
        processes: that tokenise at a time.
    """
    data = spec.data.model_copy(update={"prepared": folder / "prepared"})
    ray.init("local", num_cpus=processes, log_to_driver=False, include_dashboard=False)
    with Peak() as peak:
        began = time.perf_counter()
        manifest = prepare(spec.model_copy(update={"data": data}))
        seconds = time.perf_counter() - began
    domains = manifest.domains.values()
    return {
        "seconds": seconds,
        "tokens": sum(d.tokens + d.validation_tokens for d in domains),
        "text_bytes": sum(d.text_bytes for d in domains),
        "peak_bytes": peak.resident,
        "own_bytes": peak.own,
    }


def stream_ours(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Every micro-batch of a training by one rank, in its order, which is checked.

    Args:
        spec: of a training whose data are prepared.
        folder: not used.
        processes: logical CPUs of Ray.
    """
    ray.init("local", num_cpus=processes, log_to_driver=False, include_dashboard=False)
    stream = training_stream(spec, 0, 1)
    stream.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    [split] = stream.streaming_split(1, equal=True)
    b, wanted, began = spec.train.micro_batch_size, spec.train.steps * spec.train.micro_batches, 0.0
    for number, batch in enumerate(split.iter_batches(batch_size=b, batch_format="numpy", prefetch_batches=4)):
        assert np.array_equal(batch["position"], number * b + np.arange(b)), "the order"
        if number == 0:
            began = time.perf_counter()
        if number == wanted - 1:
            break
    return {"seconds": time.perf_counter() - began, "micro_batches": wanted - 1}
