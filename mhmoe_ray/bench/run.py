"""Overhead of a run: training with Ray Train and the data stream, compared with the same steps in a bare loop.

Both train the same model on the same samples from the same weights, so on CPUs their final losses are bit-identical.
The loop is measured twice: with the C library's default settings for memory, and with the settings of a run's workers
(train/malloc.py). Peers are loops of other packages (loops.py).
"""

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray

from mhmoe_ray.bench.loops import WARM_UP_STEPS, measure_loop, transformers_measurements
from mhmoe_ray.bench.processes import Measurement, run_in_process
from mhmoe_ray.bench.timing import measure_rounds
from mhmoe_ray.errors import JobError, SpecError
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import AttemptId, create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.cluster import WorkerRange
from mhmoe_ray.train import malloc
from mhmoe_ray.train.driver import train_run

RUN, LOOP, SETTLED = "run", "loop", "settled"
"""Names of the measurements of our code: a run, and the loop with the default memory settings and with the workers'."""


class LoopFigures(NamedTuple):
    """Measurements of a run and of loops, by name, one per round."""

    results: dict[str, list[dict[str, Any]]]
    """`seconds` of the timed steps, and `loss` of the last step. A run also has `data_wait`, the share of time spent
    waiting for data."""

    @property
    def fastest_peer(self) -> str | None:
        """Name of the peer with the lowest median time; None without peers."""
        peers = [name for name in self.results if name not in (RUN, LOOP, SETTLED)]
        return min(peers, key=self.median_seconds, default=None)

    def median_seconds(self, name: str) -> float:
        return float(statistics.median(result["seconds"] for result in self.results[name]))

    def throughput_ratios(self, name: str) -> list[float]:
        """Return the ratio of the run's tokens per second to those of a loop in each round."""
        # All train on the same number of tokens, so the ratio of their tokens per second is the inverse ratio of their
        # times.
        pairs = zip(self.results[RUN], self.results[name], strict=True)
        return [loop["seconds"] / run["seconds"] for run, loop in pairs]


def measure(
    spec: RunSpec, threads: int, rounds: int, report: Callable[[str], None], peers: bool = False
) -> LoopFigures:
    """Measure the run, the loop with both memory settings, and transformers' model as `peers`, in interleaved rounds.

    The data must be prepared. `threads` is the number of threads of the run's worker, and of the loops. Too few steps
    or missing peers are a SpecError; a measurement that fails, or different losses of run and loop, are a JobError.
    """
    peer_measurements = transformers_measurements(spec) if peers else {}
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
    contestants = {RUN: (measure_run, {}), LOOP: (measure_loop, {}), SETTLED: (measure_loop, settings)}
    contestants |= {name: (measurement, {}) for name, measurement in peer_measurements.items()}

    def measure_contestant(name: str, number: int) -> dict[str, Any]:
        measurement, environment = contestants[name]
        result = run_in_process(measurement, spec, threads, f"bench run, {name}", **environment)
        report(f"round {number + 1}: {name} {result['seconds']:.1f} s")
        return result

    results_by_name = measure_rounds(contestants, rounds, measure_contestant)
    losses = {result["loss"] for name in (RUN, LOOP, SETTLED) for result in results_by_name[name]}
    # The run and the bare loop must have equal losses on CPUs. GPUs add numbers in no fixed order, so there the losses
    # may differ slightly.
    if max(losses) - min(losses) > (1e-3 if spec.cluster.gpus_per_worker else 0):
        raise JobError(
            "bench run", f"losses differ: {losses}", "this is a bug: their steps are not the same; report it"
        )
    return LoopFigures(results_by_name)


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
