"""Overhead of a run: training with Ray Train and the data stream, compared with the same steps in a bare loop.

Both train the same model on the same samples from the same weights, so on CPUs their final losses are bit-identical.
The loop is measured twice: with the C library's default settings for memory, and with the settings of a run's workers
(train/malloc.py).
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from mhmoe_ray.bench.processes import Measurement, run_in_process
from mhmoe_ray.bench.timing import measure_rounds
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.columns import to_model_samples
from mhmoe_ray.data.shards.manifest import TOKENIZER_FILE, require_data_manifest
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.errors import JobError, SpecError
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import AttemptId, create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.cluster import WorkerRange
from mhmoe_ray.train import malloc
from mhmoe_ray.train.driver import train_run
from mhmoe_ray.train.objectives.next_token import micro_batch
from mhmoe_ray.train.step import Trainer

WARM_UP_STEPS = 10
"""Number of steps that are not timed: the first steps wait for the stream and for the compilation of kernels."""


class LoopFigures(NamedTuple):
    """Measurements of a run and of the same steps in a bare loop, one per round."""

    run: list[dict[str, Any]]
    """`seconds` of the timed steps, `loss` of the last step, and `data_wait`, the share of time spent waiting for
    data."""
    loop: list[dict[str, Any]]
    """Loop with the C library's default settings, without `data_wait`."""
    settled: list[dict[str, Any]]
    """Loop with the workers' memory settings, without `data_wait`."""

    @property
    def throughput_ratio(self) -> float:
        """Median over rounds of the ratio of the run's tokens per second to those of `loop`."""
        return _throughput_ratio(self.run, self.loop)

    @property
    def settled_throughput_ratio(self) -> float:
        """Median over rounds of the ratio of the run's tokens per second to those of `settled`."""
        return _throughput_ratio(self.run, self.settled)


def _throughput_ratio(run: list[dict[str, Any]], loop: list[dict[str, Any]]) -> float:
    # Run and loop train on the same number of tokens, so the ratio of their tokens per second is the inverse ratio of
    # their times.
    ratios: list[float] = [b["seconds"] / a["seconds"] for a, b in zip(run, loop, strict=True)]
    return statistics.median(ratios)


def measure(spec: RunSpec, threads: int, rounds: int, report: Callable[[str], None]) -> LoopFigures:
    """Measure the run, and the loop with both memory settings, in interleaved rounds.

    The data must be prepared. `threads` is the number of threads of the run's worker, and of the loop. Too few steps
    are a SpecError; a measurement that fails, or different losses, are a JobError.
    """
    steps = spec.train.steps
    if steps <= WARM_UP_STEPS:
        raise SpecError(
            "bench run", f"train.steps is {steps}, and {WARM_UP_STEPS} are not timed", "set more train.steps"
        )
    # The bare loop, with which the run is compared, has no validation and no checkpoints. The run has them only after
    # its last step, so that the timed steps of both do the same work.
    intervals = {"validate_every": steps, "checkpoint_every": steps}
    one_worker = {"workers": WorkerRange(min=1, max=1), "ep": 1, "cpus_per_worker": threads}
    updates = {"train": spec.train.model_copy(update=intervals), "cluster": spec.cluster.model_copy(update=one_worker)}
    spec = spec.model_copy(update=updates)
    settings = malloc.malloc_settings(os.environ)
    contestants: dict[str, tuple[Measurement, dict[str, str]]]
    contestants = {"run": (measure_run, {}), "loop": (measure_loop, {}), "settled": (measure_loop, settings)}

    def measure_contestant(name: str, number: int) -> dict[str, Any]:
        measurement, environment = contestants[name]
        result = run_in_process(measurement, spec, threads, f"bench run, {name}", **environment)
        report(f"round {number + 1}: {name} {result['seconds']:.1f} s")
        return result

    results_by_name = measure_rounds(contestants, rounds, measure_contestant)
    losses = {result["loss"] for results in results_by_name.values() for result in results}
    # The run and the bare loop must have equal losses on CPUs. GPUs add numbers in no fixed order, so there the losses
    # may differ slightly.
    if max(losses) - min(losses) > (1e-3 if spec.cluster.gpus_per_worker else 0):
        raise JobError(
            "bench run", f"losses differ: {losses}", "this is a bug: their steps are not the same; report it"
        )
    return LoopFigures(**results_by_name)


def measure_run(spec: RunSpec, folder: Path, _threads: int) -> dict[str, Any]:
    """Train the spec as a run on a local Ray cluster, as the job of `mhmoe submit` does."""
    ray.init("local", num_cpus=spec.cluster.cpus, log_to_driver=False, include_dashboard=False)
    run = create_run(spec.model_copy(update={"storage": folder / "runs"}))
    train_run(run, AttemptId(1))
    lines = history.read(run)
    # A line of metrics has the time at the end of its step, so the first timed step begins at the time of the line
    # before it.
    timed_lines = lines[WARM_UP_STEPS:]
    return {
        "seconds": timed_lines[-1][metrics.TIME] - lines[WARM_UP_STEPS - 1][metrics.TIME],
        "loss": lines[-1][metrics.LOSS],
        "data_wait": statistics.mean(line[metrics.DATA_WAIT] for line in timed_lines),
    }


def measure_loop(spec: RunSpec, _folder: Path, threads: int) -> dict[str, Any]:
    """Train the spec in a bare loop without Ray, on samples that are read beforehand."""
    torch.set_num_threads(threads)
    folder = spec.data.prepared
    token_bytes = require_data_manifest(folder).token_bytes
    inputs = boundaries(load_tokenizer(folder / TOKENIZER_FILE, spec.model.vocab_size))
    device = torch.device("cuda" if spec.cluster.gpus_per_worker else "cpu")
    trainer = Trainer(spec, build_mesh(spec.cluster, ["here"], device.type), device, inputs)
    positions = np.arange(spec.train.steps * spec.samples_per_step).reshape(spec.train.steps, -1)
    samples, loss = TrainingSamples.open_cached(spec), 0.0
    steps = [
        [to_model_samples(rows, token_bytes) for rows in np.split(samples.read(row), spec.train.micro_batches)]
        for row in positions
    ]
    for number, step_samples in enumerate(steps):
        if number == WARM_UP_STEPS:
            start_time = time.perf_counter()
        sums = trainer.accumulate([micro_batch(batch_samples, device) for batch_samples in step_samples])
        trainer.update(sums)
        loss = sums.loss / max(1, sums.targets)
    return {"seconds": time.perf_counter() - start_time, "loss": loss}
