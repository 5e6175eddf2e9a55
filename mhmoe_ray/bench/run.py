"""Cost of a run beyond its steps: a whole training with Ray Train and the stream, beside the same steps in a bare loop.

All of them train the same model on the same samples from the same start, so they end with the same loss, to the last
bit. The loop is measured with Python's default settings and with the memory settings that a run's workers get
(train/driver.py).
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

from mhmoe_ray.bench.processes import Measurement, run_apart
from mhmoe_ray.bench.timing import turns
from mhmoe_ray.data.shards.files import split_padding
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.data.stream import TrainingSamples
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.errors import JobError, SpecError
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.cluster import WorkerRange
from mhmoe_ray.train import malloc
from mhmoe_ray.train.driver import drive
from mhmoe_ray.train.step import MicroBatch, Trainer

WARM_UP = 10
"""Number of steps that are not timed: the first ones wait for the stream, and for kernels to be compiled."""


class Figures(NamedTuple):
    run: list[dict[str, Any]]
    """Measurements of the run, one per round: `seconds` of the timed steps, `loss` of the last one, share
    `data_wait`."""
    loop: list[dict[str, Any]]
    """Measurements of the loop with Python's default settings, one per round, without `data_wait`."""
    settled: list[dict[str, Any]]
    """Measurements of the loop with the workers' memory settings, one per round, without `data_wait`."""

    @property
    def kept(self) -> float:
        """Share of the loop's tokens per second that the run reaches, the median over rounds."""
        return _kept(self.run, self.loop)

    @property
    def kept_of_settled(self) -> float:
        return _kept(self.run, self.settled)


def _kept(run: list[dict[str, Any]], loop: list[dict[str, Any]]) -> float:
    ratios: list[float] = [b["seconds"] / a["seconds"] for a, b in zip(run, loop, strict=True)]
    return statistics.median(ratios)


def measure(spec: RunSpec, threads: int, rounds: int, tell: Callable[[str], None]) -> Figures:
    """Measure the run and both loops in interleaved rounds, every other one in reverse order.

    Args:
        spec: a spec whose data are prepared.
        threads: the number of threads of the only worker, and of the loop.
        rounds: the number of rounds.
        tell: a function that is called with a line after each measurement.

    Raises:
        SpecError: the spec has too few steps.
        JobError: one of the measurements failed, or their losses differ.
    """
    steps = spec.train.steps
    if steps <= WARM_UP:
        raise SpecError("bench run", f"train.steps is {steps}, and {WARM_UP} are not timed", "set more train.steps")
    # Nothing but steps between the first one and the last.
    rare = {"validate_every": steps, "checkpoint_every": steps}
    one = {"workers": WorkerRange(min=1, max=1), "ep": 1, "cpus_per_worker": threads}
    changed = {"train": spec.train.model_copy(update=rare), "cluster": spec.cluster.model_copy(update=one)}
    spec = spec.model_copy(update=changed)
    settings = malloc.settings(os.environ)
    ways: dict[str, tuple[Measurement, dict[str, str]]]
    ways = {"run": (a_run, {}), "loop": (a_loop, {}), "settled": (a_loop, settings)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for turn, name in turns(ways, rounds):
        way, environment = ways[name]
        result = run_apart(way, spec, threads, f"bench run, {name}", **environment)
        tell(f"round {turn + 1}: {name} {result['seconds']:.1f} s")
        found[name].append(result)
    losses = {result["loss"] for results in found.values() for result in results}
    # GPUs add up in no certain order.
    if max(losses) - min(losses) > (1e-3 if spec.cluster.gpus_per_worker else 0):
        raise JobError("bench run", f"losses differ: {losses}", "this is a defect; their steps are not the same")
    return Figures(**found)


def a_run(spec: RunSpec, folder: Path, _threads: int) -> dict[str, Any]:
    """Run the job of a run, as `mhmoe submit` starts it, and measure it."""
    ray.init("local", num_cpus=spec.cluster.cpus, log_to_driver=False, include_dashboard=False)
    run = create_run(spec.model_copy(update={"storage": folder / "runs"}))
    drive(run, 0)
    lines = history.read(run)
    timed = lines[WARM_UP:]
    return {
        "seconds": timed[-1][metrics.TIME] - lines[WARM_UP - 1][metrics.TIME],
        "loss": lines[-1][metrics.LOSS],
        "data_wait": statistics.mean(line[metrics.DATA_WAIT] for line in timed),
    }


def a_loop(spec: RunSpec, _folder: Path, threads: int) -> dict[str, Any]:
    """Run the same steps on the same samples, which are in memory before the steps are timed, and measure them."""
    torch.set_num_threads(threads)
    folder = spec.data.prepared
    token_bytes = require_data_manifest(folder).token_bytes
    start = boundaries(load_tokenizer(folder / "tokenizer.json", spec.model.vocab_size)).start
    device = torch.device("cuda" if spec.cluster.gpus_per_worker else "cpu")
    trainer = Trainer(spec, build_mesh(spec.cluster, ["here"], device.type), device, start)
    positions = np.arange(spec.train.steps * spec.samples_per_step).reshape(spec.train.steps, -1)
    steps = [split_padding(TrainingSamples.open(spec).read(row), token_bytes) for row in positions]
    b, loss = spec.train.micro_batch_size, 0.0
    for number, (token_ST, counts_ST) in enumerate(steps):
        if number == WARM_UP:
            began = time.perf_counter()
        parts = (torch.from_numpy(whole).to(device).view(-1, b, whole.shape[1]) for whole in (token_ST, counts_ST))
        sums = trainer.accumulate([MicroBatch(*pair) for pair in zip(*parts, strict=True)])
        trainer.update(sums)
        loss = sums.loss / max(1, sums.targets)
    return {"seconds": time.perf_counter() - began, "loss": loss}
